"""A folder for runs on several processes, which find the tiny model in it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model as ``base``."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "base").symlink_to(tiny_model_dir)
    return folder
