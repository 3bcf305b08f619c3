"""Tests of vlcpt/training/checkpoints/files.py."""

import json
import os
import re

import pytest
import xxhash

from vlcpt.training.checkpoints.files import (
    MANIFEST,
    UNFINISHED,
    CheckpointError,
    is_unfinished,
    verify,
    write_manifest,
)

FILES = {"model.safetensors": b"w" * 100_000, "trainer_state.json": b"{}", "global_step2/latest": b"x" * 7}


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoint-2"
    for name, content in FILES.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    return made


def test_it_lists_size_and_xxh3_of_every_file(folder):
    write_manifest(folder, {"seed": 1})

    content = json.loads((folder / MANIFEST).read_text())
    assert content["run"] == {"seed": 1}
    assert content["files"] == {
        name: {"size": len(one), "xxh3_128": xxhash.xxh3_128_hexdigest(one)} for name, one in FILES.items()
    }
    assert verify(folder).files == {name: len(one) for name, one in FILES.items()}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def emptied(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


DAMAGE = {
    "the content of model.safetensors is not what was saved": lambda f: flip(f / "model.safetensors", 50_000),
    "model.safetensors has 10 bytes where 100,000 were saved": lambda f: (
        f / "model.safetensors"
    ).write_bytes(b"w" * 10),
    "trainer_state.json has 0 bytes": lambda f: (f / "trainer_state.json").write_bytes(b""),
    "trainer_state.json is missing": lambda f: (f / "trainer_state.json").unlink(),
    "global_step2/latest is missing": lambda f: (f / "global_step2/latest").unlink(),
    "global_step2/more.pt was added": lambda f: (f / "global_step2/more.pt").write_bytes(b"code"),
    "it has no vlcpt_manifest.json, so it may be incomplete": emptied,
    "vlcpt_manifest.json is damaged": lambda f: (f / MANIFEST).write_text("{"),
    "vlcpt_manifest.json is damaged, or of another": lambda f: (f / MANIFEST).write_text(
        (f / MANIFEST).read_text().replace('"seed": 1', '"seed": 2')
    ),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_what_is_wrong_with_a_checkpoint_is_named(folder, message):
    write_manifest(folder, {"seed": 1})
    verify(folder)

    DAMAGE[message](folder)

    with pytest.raises(CheckpointError, match=message):
        verify(folder)


@pytest.mark.parametrize("place", range(0, 800, 7))
def test_no_byte_of_the_manifest_itself_can_be_flipped(folder, place):
    write_manifest(folder, {"seed": 1})
    size = (folder / MANIFEST).stat().st_size

    flip(folder / MANIFEST, place % size)

    with pytest.raises(CheckpointError, match="damaged"):
        verify(folder)


def test_a_link_to_a_folder_counts_as_a_file_that_was_added(folder, tmp_path):
    write_manifest(folder, {})
    (tmp_path / "elsewhere").mkdir()
    (folder / "global_step9").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(CheckpointError, match="global_step9 was added"):
        verify(folder)


def test_a_link_to_nowhere_is_named(folder, tmp_path):
    write_manifest(folder, {})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "nowhere")

    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: No such file"):
        verify(folder)


def test_hidden_files_of_file_systems_do_no_harm(folder):
    write_manifest(folder, {})
    (folder / ".nfs0001").write_bytes(b"")

    verify(folder)


def test_the_sizes_alone_can_be_compared(folder):
    write_manifest(folder, {})
    flip(folder / "model.safetensors", 5)

    verify(folder, hashes=False)


def test_a_folder_is_unfinished_until_its_manifest_is_there(folder):
    (folder / UNFINISHED).touch()
    assert is_unfinished(folder)
    with pytest.raises(CheckpointError, match="its saving was interrupted"):
        verify(folder)

    write_manifest(folder, {})

    assert not is_unfinished(folder)
    assert not (folder / UNFINISHED).exists()
    verify(folder)


def test_files_and_folders_are_flushed_before_the_manifest_is_renamed(folder, monkeypatch):
    events = []
    monkeypatch.setattr("os.fsync", lambda fd: events.append(_path_of(fd)))
    rename = type(folder).replace

    def replace(self, target):
        events.append(f"rename {target.name}")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "replace", replace)

    write_manifest(folder, {})

    before = events[: events.index(f"rename {MANIFEST}")]
    assert {str(folder / name) for name in FILES} < set(before)
    assert {str(folder), str(folder / "global_step2")} < set(before)
    assert re.fullmatch(rf"{re.escape(str(folder))}/\.[0-9a-f]+\.partial", before[-1])  # the manifest itself
    assert events[-1] == str(folder.parent)


def _path_of(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}")
