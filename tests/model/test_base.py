"""Tests of vlcpt/model/base.py."""

import json

import pytest

from vlcpt.model.base import base_folders, is_same_base


def model_folder(path, hidden_size=64):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"hidden_size": hidden_size}))
    return path


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint inside an output folder; the current directory is another one."""
    folder = tmp_path / "out" / "checkpoint-2"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


@pytest.mark.parametrize("place", ["out/checkpoint-2/base", "out/base", "elsewhere/base"])
def test_a_relative_base_is_looked_for_at_checkpoint_parent_and_current_directory(
    checkpoint, tmp_path, place
):
    base = model_folder(tmp_path / place)

    assert [folder.resolve() for folder in base_folders("base", checkpoint)] == [base]


@pytest.mark.parametrize("beside", ["out/checkpoint-2/config.yaml", "out/config.yaml"])
@pytest.mark.parametrize("named", ["base", "../models/base", "/gone/base"])
def test_a_base_is_looked_for_where_config_yaml_says(checkpoint, tmp_path, beside, named):
    base = model_folder(tmp_path / "models" / "base")
    up = "../" * (len(beside.split("/")) - 1)
    (tmp_path / beside).write_text(f"model_name_or_path: {up}models/base\n")

    assert [folder.resolve() for folder in base_folders(named, checkpoint)] == [base]


def test_a_config_yaml_that_names_another_model_than_the_adapter_is_not_followed(checkpoint, tmp_path):
    """Somebody has corrected the name in adapter_config.json."""
    model_folder(tmp_path / "models" / "base")
    (tmp_path / "out" / "config.yaml").write_text("model_name_or_path: ../models/base\n")

    assert base_folders("Qwen/Qwen2.5-VL-3B-Instruct", checkpoint) == []


@pytest.mark.parametrize("text", ["a: [", "- 1", "model_name_or_path: 3", "", "model_name_or_path: ~"])
def test_a_config_yaml_that_says_nothing_of_the_model_is_passed_over(checkpoint, text):
    (checkpoint / "config.yaml").write_text(text)

    assert base_folders("base", checkpoint) == []


def test_an_absolute_base_that_is_there_is_the_only_one(checkpoint, tmp_path):
    base = model_folder(tmp_path / "models" / "base")
    model_folder(tmp_path / "out" / "base")
    (tmp_path / "out" / "config.yaml").write_text("model_name_or_path: base\n")

    assert base_folders(str(base), checkpoint) == [base]


def test_a_folder_reached_by_two_ways_counts_once(checkpoint, tmp_path, monkeypatch):
    model_folder(tmp_path / "out" / "base")
    monkeypatch.chdir(tmp_path / "out")

    assert len(base_folders("base", checkpoint)) == 1


@pytest.mark.parametrize(("hidden_size", "same"), [(64, True), (32, False)])
def test_a_copy_of_the_base_is_the_same_if_its_configuration_is(checkpoint, tmp_path, hidden_size, same):
    named = model_folder(tmp_path / "named")
    used = model_folder(tmp_path / "used", hidden_size)

    assert is_same_base(str(named), str(used), checkpoint) is same
