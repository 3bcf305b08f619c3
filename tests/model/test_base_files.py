"""Tests of vlcpt/model/base_files.py."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as PILImage
from safetensors.torch import load_file
from transformers import AutoProcessor
from typer.testing import CliRunner

from tests.published import PUBLISHED, write_published
from vlcpt.cli import app
from vlcpt.model.base_files import find_base_files
from vlcpt.model.loading import load_processor
from vlcpt.model.merge import merge_adapter
from vlcpt.report.card import read_run

ROOT = Path(__file__).parents[2]
OTHERS = "VLCPT_OTHER_TRANSFORMERS"
TRL = "VLCPT_TRL"


def train(folder: Path, base: Path, **settings: object) -> Path:
    """Train two steps; gives output_dir."""
    rows = [{"text": f"Figure {number} shows the valve."} for number in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(base),
        "train_data": "train.jsonl",
        "output_dir": "out",
        "max_steps": 2,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "max_length": 64,
        **settings,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(app, ["train", str(folder / "config.yaml")])
    assert done.exit_code == 0, done.output
    return folder / "out"


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_a_run_does_not_change_is_the_bases_byte_for_byte(tmp_path, tuning):
    base = write_published(tmp_path / "base")
    output = train(tmp_path, base, tuning=tuning)

    for result in (output, output / "checkpoint-2"):
        for path in base.iterdir():
            if path.name.startswith("model") or path.name == "config.json":
                continue
            assert (result / path.name).read_bytes() == path.read_bytes(), path.name
        assert not (result / "processor_config.json").exists()
        assert not (result / "chat_template.jinja").exists()
        ours = json.loads((base / "config.json").read_text())
        if tuning == "lora":
            assert not (result / "config.json").exists()
        else:
            saved = json.loads((result / "config.json").read_text())
            assert saved == ours | {"torch_dtype": "float32"}
            assert list(saved) == list(ours)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_merged_folder_has_the_bases_files_type_and_layout_and_the_runs_record(tmp_path, tuning):
    base = write_published(tmp_path / "base")
    output = train(tmp_path, base, tuning=tuning)
    merged = tmp_path / "merged"

    merge = merge_adapter(output, merged)

    assert merge.dtype == torch.bfloat16  # a run in full is saved in float32
    stored = {one.dtype for file in merged.glob("*.safetensors") for one in load_file(file).values()}
    assert stored == {torch.bfloat16}
    for path in base.iterdir():
        if not path.name.startswith("model"):  # config.json too: its type is the base's
            assert (merged / path.name).read_bytes() == path.read_bytes(), path.name
    assert not (merged / "processor_config.json").exists()
    assert not (merged / "adapter_config.json").exists()
    for name in ("config.yaml", "ledger.json", "train_log.jsonl"):
        assert (merged / name).read_bytes() == (output / name).read_bytes(), name
    assert read_run(merged).trained == read_run(output).trained
    assert read_run(merged).settings == read_run(output).settings


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_merged_checkpoint_has_the_log_up_to_its_step(tmp_path, tuning):
    base = write_published(tmp_path / "base")
    output = train(tmp_path, base, tuning=tuning, max_steps=4, logging_steps=1)

    merge_adapter(output / "checkpoint-2", tmp_path / "merged")

    lines = (tmp_path / "merged/train_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 2
    assert (tmp_path / "merged/ledger.json").read_bytes() == (output / "ledger.json").read_bytes()


@pytest.mark.parametrize("published", [True, False], ids=["published", "saved"])
def test_the_limit_of_pixels_reaches_a_merged_models_processor(tmp_path, tiny_model_dir, published):
    base = write_published(tmp_path / "base") if published else tiny_model_dir
    output = train(tmp_path, base, max_pixels=4 * 28 * 28)

    merge_adapter(output, tmp_path / "merged")

    image = PILImage.new("RGB", (280, 280))
    plain = AutoProcessor.from_pretrained(tmp_path / "merged").image_processor
    assert plain(images=[image], return_tensors="pt").image_grid_thw.prod() <= 4 * 4
    before = AutoProcessor.from_pretrained(base).image_processor
    assert before(images=[image], return_tensors="pt").image_grid_thw.prod() == 400


def test_a_processor_that_was_changed_in_python_is_not_overwritten(tmp_path):
    base = write_published(tmp_path / "base")
    processor = load_processor(str(base))
    processor.tokenizer.add_tokens(["<figure>"])
    processor.save_pretrained(tmp_path / "result")

    found = find_base_files(str(base))
    assert found is not None
    found.restore(tmp_path / "result", model=None)

    assert load_processor(str(tmp_path / "result")).tokenizer.convert_tokens_to_ids("<figure>") == 1024
    kept = "preprocessor_config.json"
    assert (tmp_path / "result" / kept).read_bytes() == (base / kept).read_bytes()


def load_elsewhere(
    results: dict[Path, Path], packages: str, folder: Path
) -> tuple[dict[Path, tuple[dict[str, object], np.ndarray]], str]:
    """What each result gives, by its base, in one process of another version; and which version that is."""
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": packages, "HF_HUB_OFFLINE": "1"}
    files = {result: folder / f"{number}.npy" for number, result in enumerate(results)}
    given = [str(path) for result, base in results.items() for path in (base, result, files[result])]
    command = [sys.executable, str(ROOT / "tests" / "elsewhere.py"), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {
        result: (facts, np.load(files[result])) for result, facts in zip(results, found["facts"], strict=True)
    }, found["version"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Trained and merged results of each base and tuning, by base, and what each version gives for them.

    A process a version, as its imports take ten times as long as what it does.
    """
    folder, results = tmp_path_factory.mktemp("results"), {}
    for layout, tuning in product(("3B", "7B"), ("lora", "full")):
        here = folder / f"{layout} {tuning}"
        here.mkdir()
        vocabulary, tied = PUBLISHED[layout]
        base = write_published(here / "base", vocabulary=vocabulary, tied=tied)
        output = train(here, base, tuning=tuning, max_pixels=4 * 28 * 28)
        merge_adapter(output, here / "merged")
        results |= {output: base, here / "merged": base}
    versions = ["", *os.environ[OTHERS].split(os.pathsep)]
    return (
        folder,
        results,
        [
            load_elsewhere(results, packages, folder / f"version {number}")
            for number, packages in enumerate(versions)
        ],
    )


@pytest.mark.slow
@pytest.mark.skipif(
    OTHERS not in os.environ, reason=f"{OTHERS} names no folders of other versions; .ci/run does"
)
@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("layout", ["3B", "7B"])
def test_results_load_in_other_versions_and_give_the_same_logits(loaded, tuning, layout):
    folder, results, ((here, version), *others) = loaded
    assert others

    for result in (folder / f"{layout} {tuning}" / name for name in ("out", "merged")):
        expected, logits = here[result]
        assert expected["wrong tensors"] == {}
        for there, other in others:
            facts, other_logits = there[result]
            assert other != version
            assert facts == expected
            np.testing.assert_allclose(other_logits, logits, atol=1e-4, rtol=1e-4)
    image = load_processor(str(results[result])).image_token_id
    pads = [token for token in expected["ids"][0] if token == image]
    assert len(pads) <= 4  # of an image of 12 without the limit


@pytest.mark.slow
@pytest.mark.skipif(TRL not in os.environ, reason=f"{TRL} names no folder with TRL; .ci/run does")
def test_trl_continues_from_an_adapter_and_from_a_merged_model(tmp_path):
    base = write_published(tmp_path / "base")
    adapter = train(tmp_path, base)
    merge_adapter(adapter, tmp_path / "merged")

    for result in (adapter, tmp_path / "merged"):
        environment = os.environ | {"PYTHONPATH": os.environ[TRL], "HF_HUB_OFFLINE": "1"}
        script = str(ROOT / "tests" / "going_on_in_trl.py")
        command = [sys.executable, script, str(base), str(result), str(tmp_path / "trl" / result.name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        for kind, found in json.loads(done.stdout.splitlines()[-1]).items():
            assert len(found["losses"]) == 2, kind
            assert np.isfinite(found["losses"]).all(), kind
            assert found["losses"][0] == pytest.approx(found["expected"], rel=1e-3), kind
            assert found["losses"][1] < found["losses"][0], kind
            assert found["moved"] > 0, kind
            assert found["frozen moved"] == 0, kind
            assert found["saved difference"] < 1e-4, kind
