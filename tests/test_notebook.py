"""examples/own_pictures.ipynb runs from its first cell to its last, and shows what it says."""

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples/own_pictures.ipynb"


def test_no_output_is_kept_in_git():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells

    assert len([cell for cell in cells if cell.cell_type == "code"]) > 8
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
def test_it_runs_and_the_model_names_what_it_sees(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{NOTEBOOK.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)

    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert [output for output in outputs if "image/png" in output.get("data", {})]  # picture and curve
    assert "Traceback" not in printed
    found = json.loads((tmp_path / "own_pictures/eval.json").read_text())["sets"]["held_out"]
    assert found["loss"] + 1 < found["blank_images_loss"]
    assert found["loss"] < found["shuffled_images_loss"]
    assert int(re.findall(r"(\d) of 8 right", printed)[0]) >= 6
