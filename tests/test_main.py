"""The commands on terminals that lack characters."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import Started
from tests.support import png
from vlcpt.__main__ import main, print_everywhere
from vlcpt.demo import base_path

ENCODINGS = ("ascii", "cp936", "latin-1")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Rows whose text, id and picture have Chinese, emoji and accents, and one that is bad."""
    (tmp_path / "照片 é.png").write_bytes(png(1))
    row = {
        "id": "阀 😀",
        "text": "<image>安全阀 <trainable_text>👩‍🔧 修理 é ½</trainable_text>",
        "images": ["照片 é.png"],
    }
    with (tmp_path / "数据.jsonl").open("w", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n" + json.dumps(row) + "\n")
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: [{{path: 数据.jsonl, name: 数据}}]\n"
        "output_dir: out\neval_data: [{path: 数据.jsonl, name: 评测}]\nmax_length: 128\nmax_steps: 1\n"
        "use_cpu: true\ndataloader_num_workers: 0\n",
        encoding="utf-8",
    )
    return tmp_path


@pytest.fixture
def command(project: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a command here, on a terminal that ends a program which sends it anything else than its encoding.
    Gives the exit code, and the two texts."""

    def run(encoding: str, *arguments: str) -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.chdir(project)
            patch.setattr(sys, "argv", ["vlcpt", *arguments])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            with pytest.raises(SystemExit) as ended:
                main()
            for stream in streams:
                stream.flush()
        code = ended.value.code
        texts = [stream.buffer.getvalue().decode(encoding) for stream in streams]  # type: ignore[attr-defined]
        return (code if isinstance(code, int) else int(bool(code)), *texts)

    return run


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_check_and_inspect_print_on_any_terminal(command, encoding: str) -> None:
    code, shown, errors = command(encoding, "check", "my.yaml")
    assert code == 0, errors
    assert "documents read" in shown
    assert "─" not in shown

    code, shown, errors = command(encoding, "inspect", "my.yaml")
    assert code == 0, errors
    assert "targets" in shown
    assert ("修理" in shown) == (encoding == "cp936")
    assert ("é" in shown) == (encoding != "ascii")


def test_targets_keep_their_marks_where_the_terminal_has_no_such_characters(command) -> None:
    code, shown, errors = command("ascii", "inspect", "my.yaml")
    assert code == 0, errors
    assert "<<" in shown and ">>" in shown


def test_train_eval_and_their_files_do_not_depend_on_the_terminal(command, project: Path) -> None:
    code, shown, errors = command("ascii", "train", "my.yaml")
    assert code == 0, errors
    assert "step 1/1" in shown
    assert "数据" in json.loads((project / "out/ledger.json").read_text("utf-8"))["sources"]
    code, shown, errors = command("ascii", "eval", "my.yaml", "--checkpoint", "out", "--output", "a.json")
    assert code == 0, errors
    assert "perplexity" in shown
    assert list(json.loads((project / "a.json").read_text("utf-8"))["sets"]) == ["评测"]


def test_an_error_about_a_row_is_printed_and_written_whole(command, project: Path) -> None:
    with (project / "数据.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "坏", "text": "a</trainable_text>"}\n')
    code, shown, errors = command("ascii", "check", "my.yaml")
    assert code == 1, errors
    assert "closes nothing" in shown + errors
    assert '"坏"' in (project / "out/dropped.jsonl").read_text("utf-8")
    code, _, errors = command("ascii", "train", "my.yaml")
    assert code == 1
    assert "vlcpt: ??.jsonl:3: id ?: text, character 1: </trainable_text> closes nothing" in errors


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("env",), ("check", "没有.yaml")])
def test_help_versions_and_mistakes_print_on_any_terminal(command, arguments: tuple[str, ...]) -> None:
    code, shown, errors = command("ascii", *arguments)
    assert code == (2 if "check" in arguments else 0)
    assert shown or "??.yaml" in errors


def test_halves_of_characters_are_printed_on_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python gives them for bytes in the name of a file that are not UTF-8."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    print_everywhere()
    print(os.fsdecode(b"a\xff.png"), "中", flush=True)
    assert stream.buffer.getvalue().decode() == "a?.png 中\n"  # type: ignore[attr-defined]


@pytest.fixture
def inspected(project: Path) -> list[str]:
    """``vlcpt inspect`` of a row in Chinese."""
    (project / "a.jsonl").write_text(json.dumps({"text": "安全阀"}) + "\n")
    (project / "b.yaml").write_text(
        f"model_name_or_path: {base_path()}\ntrain_data: a.jsonl\noutput_dir: out\nuse_cpu: true\n"
    )
    return ["vlcpt", "inspect", "b.yaml"]


@pytest.mark.parametrize("encoding", ["ascii", "cp936"])
def test_inspect_goes_through_where_streams_are_not_in_utf_8(
    project: Path, inspected: list[str], encoding: str
) -> None:
    output, errors = project / "stdout", project / "stderr"
    run = Started(inspected, output, errors, cwd=project, environment={"PYTHONIOENCODING": encoding})
    assert run.wait(120) == 0, errors.read_bytes()
    assert b"Traceback" not in errors.read_bytes()
    assert b"a.jsonl:1" in output.read_bytes()


def test_inspect_goes_through_in_a_process_without_utf_8(project: Path, inspected: list[str]) -> None:
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    whole = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    run = subprocess.run(
        [sys.executable, "-m", *inspected],
        cwd=project,
        env=whole | environment,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert b"Traceback" not in run.stderr
    assert b"a.jsonl:1" in run.stdout


@pytest.mark.parametrize("hanging", [False, True])
def test_a_signalled_command_lets_trackers_send_what_is_left_but_does_not_wait_for_ever(
    hanging: bool,
) -> None:
    lines = ["import atexit, time", "from vlcpt.__main__ import _leave"]
    if hanging:  # hooks run in the opposite order
        lines.append("atexit.register(time.sleep, 300)")
    lines += ["atexit.register(print, 'sent')", "_leave(143)"]

    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=120, check=False
    )

    assert (ended.returncode, ended.stdout) == (143, "sent\n")


# What threads of gloo may do to a process at its end, in C++: here for certain.
ABORTS = """
import atexit, ctypes, threading, time
import torch.distributed as dist
from vlcpt.__main__ import _leave

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
abort = ctypes.CFUNCTYPE(None)(ctypes.CDLL(None).abort)
ctypes.CDLL(None).__cxa_atexit(abort, None, None)
atexit.register(print, "sent")
threading.Thread(target=lambda: (time.sleep(0.5), print("uploaded"))).start()
"""


def test_a_rank_that_is_done_ends_with_0_whatever_a_thread_would_do_at_its_end() -> None:
    def run(script: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    ended = run(ABORTS + "_leave(0)")

    assert (ended.returncode, ended.stdout) == (0, "uploaded\nsent\n")
    assert run(ABORTS).returncode < 0  # ended by a signal, or this shows nothing
