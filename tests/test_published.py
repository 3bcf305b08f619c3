"""Every command on a base laid out as Qwen publishes it; that results are right, tests/invariants/ says."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from tests.published import REAL
from tests.support import avi, digits, png
from vlcpt.cli import app

WAYS = {
    "lora": {},
    "qlora": {"tuning": "qlora"},
    "full": {"tuning": "full"},
    "vision and merger": {"tuning": "full", "train_vision": True, "train_merger": True},
    "embeddings": {"train_embeddings": True},
    "embeddings alone": {"tuning": "full", "train_language": False, "train_embeddings": True},
    "towers of two kinds": {
        "train_vision": True,
        "train_merger": True,
        "lora_towers": ["language", "vision"],
    },
}
CASES = [
    *(("3B", way) for way in WAYS),
    *(("7B", way) for way in ("full", "embeddings")),
    pytest.param(REAL, "full", marks=pytest.mark.slow),
]


def vlcpt(*arguments: object) -> Result:
    """A command in this process, which must end well."""
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture
def project(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A folder with rows of each kind, and a configuration without a way of tuning."""
    (tmp_path / "a.png").write_bytes(png(1, 84, 56))
    (tmp_path / "b.avi").write_bytes(avi(1))
    rows: list[dict[str, object]] = [
        {"text": f"<image>one <trainable_text>{digits(12)}</trainable_text>", "images": ["a.png"]},
        {"text": f"<video>two <trainable_text>{digits(9, 1)}</trainable_text>", "videos": ["b.avi"]},
        *({"text": f"words <trainable_text>{digits(20, seed)}</trainable_text>"} for seed in range(2, 6)),
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    settings = {
        "model_name_or_path": str(tiny_model_dir),
        "train_data": "train.jsonl",
        "eval_data": [{"path": "train.jsonl", "name": "same"}],
        "output_dir": "out",
        "max_length": 64,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "dataloader_num_workers": 0,
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def weights_of(run: Path) -> bytes:
    return next(iter([*run.glob("adapter_model.safetensors"), *run.glob("model.safetensors")])).read_bytes()


def measure(config: Path, checkpoint: Path) -> dict[str, float]:
    output = config.parent / "eval.json"
    vlcpt("eval", config, "--checkpoint", checkpoint, "--output", output)
    found: dict[str, float] = json.loads(output.read_text())["sets"]["same"]
    return found


@pytest.mark.parametrize(("layout", "way"), CASES, indirect=["layout"])
def test_each_way_of_tuning_goes_from_check_to_push(project: Path, way: str) -> None:
    config, out = project / "my.yaml", project / "out"
    config.write_text(config.read_text() + (yaml.safe_dump(WAYS[way]) if WAYS[way] else ""))

    assert "memory" in vlcpt("check", config, "--output_dir", project / "checked").output
    vlcpt("train", config)
    weights = weights_of(out)
    shutil.rmtree(out / "checkpoint-4")
    vlcpt("train", config, "--resume_from_checkpoint", "true")
    assert weights_of(out) == weights

    found = measure(config, out)
    assert found["loss"] < found["base_loss"]
    pushed = vlcpt("push", out, "me/mine", "--dry-run", "--base_model", "Qwen/Qwen2.5-VL-3B-Instruct").output
    is_adapter = (out / "adapter_config.json").is_file()
    assert ("adapter_model.safetensors" if is_adapter else "model.safetensors") in pushed
    vlcpt("merge", out, project / "merged")
    if way != "qlora":  # whose adapter is measured on 4 bits
        assert measure(config, project / "merged")["loss"] == pytest.approx(found["loss"], rel=0.02)


@pytest.mark.parametrize("layout", ["3B"], indirect=True)
def test_data_is_looked_at_and_prepared(project: Path) -> None:
    config = project / "my.yaml"

    vlcpt("check", config, "--decode", "--output_dir", project / "checked")
    assert "words" in vlcpt("inspect", config).output
    vlcpt("prepare", config, "--output", project / "prepared")
    for data in ("train.jsonl", "prepared"):
        vlcpt("train", config, "--train_data", project / data, "--output_dir", project / f"of {data}")

    assert weights_of(project / "of prepared") == weights_of(project / "of train.jsonl")
