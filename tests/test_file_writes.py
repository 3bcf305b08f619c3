"""Tests of vlcpt/file_writes.py: files whole or not at all, and what is said where that is not possible."""

import errno
import os
import pickle
import resource
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from vlcpt import file_writes
from vlcpt.demo import base_path
from vlcpt.file_writes import WriteError, Writing, append_lines, human_size, refusal, write_file
from vlcpt.model.loading import load_processor

FULL = Path("/dev/full")


def fails(number):
    """What fails in the place of a call to the system."""

    def call(*ignored, **also):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def small_files():
    """No file may have more than 4,000 bytes: a write is cut, and then fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_write_that_fails_is_an_error_with_path_need_and_room_and_leaves_the_old_file(
    tmp_path, monkeypatch, number
):
    write_file(tmp_path / "a.json", "old")
    monkeypatch.setattr("os.fsync", fails(number))

    with pytest.raises(WriteError) as raised:
        write_file(tmp_path / "a.json", "x" * 12_345, "an account")

    said = str(raised.value)
    assert said.startswith(f"{tmp_path}/a.json (an account) could not be written: {os.strerror(number)}. ")
    assert "It takes about 12.3 kB, and " in said
    assert f"B are free there. {'Make room' if number in (errno.ENOSPC, errno.EDQUOT) else 'Choose'}" in said
    assert "\n" not in said
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.json", "old")]


def test_a_limit_on_files_leaves_the_old_file_and_says_which_limit(tmp_path, small_files):
    write_file(tmp_path / "a.json", "old")

    with pytest.raises(WriteError, match=r"could not be written: File too large \(of ulimit -f, or of the f"):
        write_file(tmp_path / "a.json", "x" * 5000)

    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a.json", "old")]


def test_lines_that_only_fit_in_part_are_not_added_at_all(tmp_path, small_files):
    append_lines(tmp_path / "a.jsonl", "x" * 3989 + "\n")

    with pytest.raises(WriteError, match=r"a\.jsonl \(a log\) could not be written: .* takes about 30 bytes"):
        append_lines(tmp_path / "a.jsonl", "y" * 29 + "\n", "a log")

    assert (tmp_path / "a.jsonl").read_text() == "x" * 3989 + "\n"
    append_lines(tmp_path / "a.jsonl", "z\n")
    assert (tmp_path / "a.jsonl").read_text().endswith("x\nz\n")


def test_a_folder_below_a_file_and_a_name_that_is_too_long_are_errors(tmp_path):
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(
        WriteError, match=r"file/a\.json could not be written: File exists \(in the place of its folder\)\. "
    ):
        write_file(tmp_path / "file/a.json", "")
    with pytest.raises(
        WriteError, match=r"could not be written: File name too long\. .* Choose another place"
    ):
        write_file(tmp_path / ("a" * 300), "")


def test_a_name_of_full_length_can_be_written(tmp_path):
    write_file(tmp_path / ("阀" * 85), "abc")

    assert (tmp_path / ("阀" * 85)).read_text() == "abc"


def test_a_lone_surrogate_is_written_as_json_writes_it(tmp_path):
    write_file(tmp_path / "a.json", '"\udcff"')

    assert (tmp_path / "a.json").read_text() == '"\\udcff"'


def test_no_free_inode_is_not_taken_for_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(file_writes, "_free_names", lambda path: False)

    found = refusal(OSError(errno.ENOSPC, ""), tmp_path)

    assert found.reason.endswith("(for one more file, however small: its file system has no free inode)")


def save_arrow(path):
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema([("a", pa.binary())])) as writer:
        writer.write_batch(pa.record_batch([[b"x" * 100_000]], ["a"]))


LIBRARIES = {
    "torch": lambda path: torch.save(torch.zeros(20_000), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(20_000)}, path),
    "arrow": save_arrow,
    "tokenizers": lambda path: load_processor(base_path()).tokenizer.backend_tokenizer.save(str(path)),
    "python": lambda path: path.write_bytes(b"x" * 100_000),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_raises_on_a_full_disk_has_the_same_message(tmp_path, small_files, library):
    """Each has a type of its own; tokenizers' is Exception itself."""
    with (
        pytest.raises(WriteError, match=r"a\.file \(a test\) could not be written: (File too|the disk took)"),
        Writing(tmp_path / "a.file", "a test", reads=True),
    ):
        LIBRARIES[library](tmp_path / "a.file")


def test_an_error_that_a_library_raises_about_a_full_disk_is_known_by_its_cause(tmp_path):
    def load():
        try:
            FULL.write_text("abc")
        except OSError as error:
            raise ValueError("An error occurred while generating the dataset") from error

    with pytest.raises(WriteError, match="No space left on device"), Writing(tmp_path, "a cache", reads=True):
        load()


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        FileNotFoundError(errno.ENOENT, "", "elsewhere/a.json"),
        RuntimeError("CUDA error"),
    ],
)
def test_what_reading_or_computing_raises_passes(tmp_path, error):
    with pytest.raises(type(error)) as raised, Writing(tmp_path, "a test", reads=True):
        raise error

    assert raised.value is error


def test_the_error_keeps_its_message_between_processes():
    assert str(pickle.loads(pickle.dumps(WriteError("a could not be written")))) == "a could not be written"


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_960, "1.0 MB")]
)
def test_bytes_are_shown_for_people(count, shown):
    assert human_size(count) == shown
