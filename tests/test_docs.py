"""What docs/ says is run as it is written."""

import json
import re
import runpy
import shlex
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import TrainerState
from typer.testing import CliRunner

import vlcpt
from tests.processes import run_module
from tests.support import opened
from vlcpt import CPTDataset, read_documents
from vlcpt.cli import app
from vlcpt.config.schema import as_sources
from vlcpt.data import workers
from vlcpt.data.formats.detect import SCHEMAS, detect_format
from vlcpt.data.plan.ledger import DOCUMENT_COUNTS, TOKEN_COUNTS, Ledger
from vlcpt.demo import base_path
from vlcpt.training import progress
from vlcpt.training.scores import SetResult

ROOT = Path(__file__).parents[1]
DATA = (ROOT / "docs/data.md").read_text("utf-8")
SCALE = (ROOT / "docs/scale.md").read_text("utf-8")
KEYS = runpy.run_path(str(ROOT / "docs/make_configuration.py"))
MEMORY_TABLE = runpy.run_path(str(ROOT / "docs/make_memory_table.py"))
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
TRAINING = ("training.md", "training.zh.md")
SECTIONS = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", DATA, re.M | re.S))


def block(text: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)
    return found


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text("utf-8")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_of_a_page_leads_somewhere(path):
    """A file that is there, and a heading of it, or an id before one."""
    for link in re.findall(r"\]\(([^):]+)\)", path.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        text = target.read_text("utf-8") if anchor else ""
        headings = {
            re.sub(r"[^\w -]", "", words).lower().replace(" ", "-")
            for words in re.findall(r"^#+ (.*)$", text, re.M)
        }
        assert not anchor or anchor in headings | set(re.findall(r'^<a id="([\w-]+)"></a>$', text, re.M)), (
            link
        )


@pytest.mark.parametrize(
    "behaviour",
    [
        *("span edges", "mixing", "HEIC", "resume refusal", "learning rate of each tower", "defaults"),
        *("the card", "worker's death", "the fill of packs", "video sampling"),
    ],
)
def test_the_design_names_one_file_for_a_behaviour(behaviour):
    """A stranger finds the file at the first look: by the words that one would search for, in one line."""
    tree = page("design.md").split("```")[1]

    assert len([line for line in tree.splitlines() if behaviour in line]) == 1


def test_the_python_example_of_training_runs_as_written(tmp_path):
    example = block(page("training.md"), "python")
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    result = run_module("example", cwd=tmp_path, environment={"CUDA_VISIBLE_DEVICES": ""})

    assert result.returncode == 0, result.stderr
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", TRAINING)
def test_the_rows_of_training_are_read(name, tmp_path):
    (tmp_path / "rows.jsonl").write_text(block(page(name), "json"), encoding="utf-8")
    documents = list(read_documents(tmp_path / "rows.jsonl"))

    assert [len(document.segments) for document in documents] == [3, 3, 1]
    assert documents[1].segments[-1].weight == 0.5


def test_the_page_of_the_api_has_every_public_name():
    assert sorted(re.findall(r"^::: vlcpt\.(\w+)$", page("api.md"), re.M)) == sorted(vlcpt.__all__)


@pytest.mark.parametrize("name", ["evaluation.md", "evaluation.zh.md"])
def test_every_figure_of_an_evaluation_is_explained(name):
    explained = set(re.findall(r"^\| `(\w+)` \|", page(name), re.M))

    assert explained == set(SetResult.__annotations__)


@pytest.fixture
def media(tmp_path):
    """The files that the rows name."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (56, 28), "steelblue").save(tmp_path / name)
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(8):
            frame = np.full((64, 64, 3), number * 20, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return tmp_path


def test_every_format_has_a_section():
    assert list(SECTIONS) == list(SCHEMAS)


@pytest.mark.parametrize("format", SECTIONS)
def test_the_rows_of_each_format_are_recognised_and_train(format, media, tiny_processor):
    is_text = format == "text"
    path = media / ("rows.txt" if is_text else "rows.jsonl")
    path.write_text(block(SECTIONS[format], "text" if is_text else "json"), encoding="utf-8")
    source = opened(path)

    assert detect_format(source.rows, "rows") == format
    dataset = CPTDataset(path, tiny_processor, max_length=512)
    assert dataset.ledger.total.documents["used"] == len(source) > 0
    assert sum(len(dataset[number]) for number in range(len(dataset))) == len(source)
    assert dataset.pack_sizes()[:, 1].sum() > 0


def test_the_sources_of_the_yaml_are_valid():
    entries = yaml.safe_load(block(DATA, "yaml"))["train_data"]
    sources = as_sources(entries)

    assert [source.name for source in sources] == ["pages", "chats", "captions", "web", "hub"]


def test_the_python_example_runs(media, monkeypatch, capsys):
    monkeypatch.chdir(media)
    (media / "pages.jsonl").write_text(block(SECTIONS["sharegpt"], "json"), encoding="utf-8")
    exec(compile(block(DATA, "python"), "docs/data.md", "exec"), {})

    printed = capsys.readouterr().out.splitlines()
    assert int(printed[0]) > 1
    assert printed[1].startswith("pages.jsonl:1 <image>")


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A folder with my.yaml and its data, from which commands are run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "one two"}) + "\n")
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: train.jsonl\noutput_dir: out\nuse_cpu: true\n"
        "dataloader_num_workers: 0\n"
    )
    return tmp_path


# That two engines give equal shards is shown elsewhere; a Ray cluster takes long to start.
COMMANDS = [line for line in SCALE.splitlines() if line.startswith("vlcpt ") and "--engine ray" not in line]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_scale_run(command, run_folder):
    arguments = shlex.split(command, comments=True)[1:]
    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 0, result.output
    if arguments[0] == "check":
        ledger = json.loads((run_folder / "out/ledger.json").read_text())
        assert ledger["total"]["documents"]["used"] == 1
    else:
        assert arguments[0] == "prepare"
        assert list((run_folder / "prepared").iterdir())


def test_the_commands_of_inspect_run(run_folder):
    (run_folder / "train.jsonl").write_text('{"text": "one two"}\n' * 101)
    for command in re.findall(r"^vlcpt .*$", page("inspect.md"), re.M):
        result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
        assert result.exit_code == 0, result.output

    sizes = {path.name: path.stat().st_size for path in run_folder.glob("*.html")}
    assert sizes["all.html"] > sizes["rows.html"] > 10_000


def test_the_python_example_of_inspect_runs_and_shows_what_it_says():
    *steps, shown, described, ledger = block(page("inspect.md"), "python").splitlines()
    names = {}
    exec(compile("\n".join(steps), "docs/inspect.md", "exec"), names)

    assert str(eval(shown, names)).startswith("item 0 of 1: ")
    assert all("1 of 1 documents used" in repr(eval(line, names)) for line in (described, ledger))


@pytest.mark.parametrize(
    "size", ["3B", *(pytest.param(size, marks=pytest.mark.slow) for size in ("7B", "32B", "72B"))]
)
def test_the_memory_table_is_what_its_script_prints(size):
    printed = list(MEMORY_TABLE["lines"](size))

    for text in (SCALE, page("scale.zh.md")):
        assert [line for line in text.splitlines() if line.startswith(f"| {size} |")] == printed


def test_every_key_of_a_configuration_is_listed_with_its_default():
    page = (ROOT / "docs/configuration.md").read_text("utf-8")
    found = re.findall(r"^## ([\w ]+)\n\n(.*?)\n\n", page + "\n", re.M | re.S)

    assert "| `lora_r` | whole number | 16 | Rank of the adapters. |" in page
    assert found == [(name, "\n".join(KEYS["lines"](one))) for name, one in KEYS["SECTIONS"].items()]


def test_every_key_of_the_ledger_is_explained():
    (section,) = re.findall(r"^## The ledger\n(.*?)^## ", DATA, re.M | re.S)
    explained = set(re.findall(r"`(\w+)`", section)) | {"read"}

    assert {*DOCUMENT_COUNTS, *TOKEN_COUNTS, *Ledger([]).as_json()} - {"sources", "total"} <= explained


def test_the_gpu_page_shows_the_log_line_and_the_message_as_they_are():
    """Its numbers are made up, and it says so; its form is the run's own."""
    text = page("gpu.md")
    (shown,) = re.findall(r"^step 20/900.*$", text, re.M)
    spent = {"data_wait": 0.01, "forward": 0.33, "backward": 0.61, "optimizer": 0.05}
    logs = {"loss": 1.8421, "targets_per_second": 9412, "mfu": 0.41, "fill": 0.99, "learning_rate/all": 1e-4}
    logs |= {f"seconds/{phase}": seconds for phase, seconds in spent.items()}
    state = TrainerState(global_step=20, max_steps=900)

    assert re.sub(" +", " ", shown) == re.sub(" +", " ", progress._line(state, logs, width=None))
    what, todo = workers._end_of(-signal.SIGBUS)
    assert f"a process that read documents {what}" in text
    assert re.search("docker (--shm-size 8g) or (--ipc host)", todo)
    assert "--shm-size 8g" in text and "--ipc host" in text


def test_the_memory_table_has_every_size():
    first = SCALE.index("\n".join(MEMORY_TABLE["heading"]()))
    sizes = [line.split()[1] for line in SCALE[first:].splitlines()[2:] if line.startswith("|")]

    assert list(dict.fromkeys(sizes)) == list(MEMORY_TABLE["SIZES"])


def test_the_measured_peaks_are_those_of_the_results_page():
    results = (ROOT / "benchmarks/results/2026-11-24-memory.md").read_text("utf-8")
    for text in (SCALE, page("scale.zh.md")):
        peaks = [line for line in text.splitlines() if " MiB |" in line]
        assert len(peaks) > 10
        assert [line for line in peaks if line not in results] == []
