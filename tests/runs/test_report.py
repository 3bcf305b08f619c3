from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.report.pages.test_run import write
from vlcpt.cli import app


def report(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


def test_one_run_gets_its_page_in_its_folder(tmp_path):
    done = report(write(tmp_path / "run"))

    assert done.output == f"written to {tmp_path}/run/report.html\n"
    assert "Training loss" in (tmp_path / "run/report.html").read_text()


def test_several_runs_get_one_page_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    done = report(write(Path("a")), write(Path("b")))

    assert done.output == "written to report.html\n"
    assert "2 runs compared" in Path("report.html").read_text()


def test_the_page_goes_where_it_is_wanted(tmp_path):
    report(write(tmp_path / "run"), "--output", tmp_path / "new/page.html")

    assert (tmp_path / "new/page.html").is_file()
    assert not (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: no such folder. Give the output_dir of a run."),
        (["empty"], "empty: no run is in it"),
        (["run", "--output", "empty"], "--output empty: not a file that can be written"),
        (["run", "--evaluation", "gone.json"], "--evaluation gone.json: no such file"),
        (["run", "--evaluation", "run/run.json"], "run.json: not what `vlcpt eval --output` writes"),
        (["run", "run", "--evaluation", "run/run.json"], "--evaluation is of one run"),
        (["run/checkpoint-2"], "Give the folder above it."),
    ],
)
def test_what_cannot_be_done_is_a_wrong_command(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    write(Path("run"))
    Path("run/checkpoint-2").mkdir()
    Path("empty").mkdir()

    done = report(*words)

    assert done.exit_code == 2
    assert says in done.stderr
    assert not Path("report.html").exists()
