"""Tests of vlcpt/runs/features.py: ``vision_cache`` filled ahead."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from tests.support import avi, png
from vlcpt.cli import app
from vlcpt.config.yaml import Configs, load_config
from vlcpt.data.documents import DocumentError
from vlcpt.data.plan.ledger import BadDataError
from vlcpt.errors import ConfigError
from vlcpt.runs import features as features_module
from vlcpt.runs.check import check_run
from vlcpt.runs.prepare import prepare_run
from vlcpt.runs.train import train_run
from vlcpt.training.step import sent


@pytest.fixture
def make_configs(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Configs]:
    """A function that gives a configuration of six documents with media and one without."""
    rows = []
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number, 56, 56 + 28 * number))
        (tmp_path / f"{number}.avi").write_bytes(avi(number))
        rows += [
            {
                "text": f"<image>one <trainable_text>two {number}</trainable_text>",
                "images": [f"{number}.png"],
            },
            {"text": f"<video><trainable_text>{number}</trainable_text>", "videos": [f"{number}.avi"]},
        ]
    rows.append({"text": "three <trainable_text>four</trainable_text>"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "held.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {tiny_model_dir}\ntrain_data: rows.jsonl\neval_data: held.jsonl\n"
        "eval_strategy: 'no'\n"
        "output_dir: out\nmax_length: 48\nmax_steps: 3\nuse_cpu: true\ndataloader_num_workers: 0\n"
        "vision_cache: cache\nreport_to: none\nsave_strategy: 'no'\n"
    )

    def made(*overrides: str) -> Configs:
        return load_config(tmp_path / "my.yaml", overrides)

    return made


def quiet() -> Console:
    return Console(file=StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def tower_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Calls of any vision tower from now on."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    calls: list[int] = []
    forward = Qwen2_5_VisionTransformerPretrainedModel.forward

    def counted(self: object, *args: object, **kwargs: object) -> object:
        calls.append(1)
        return forward(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Qwen2_5_VisionTransformerPretrainedModel, "forward", counted)
    return calls


def test_a_run_whose_cache_was_filled_ahead_never_calls_the_tower(make_configs, tmp_path, monkeypatch):
    prepare_run(make_configs(), None, console=quiet())
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 6
    calls = tower_calls(monkeypatch)

    # Blank images are of no file, so that their features are not kept.
    train_run(make_configs("--eval_strategy", "epoch", "--eval_blank_images", "false"), quiet())

    assert calls == []


def test_filling_again_computes_nothing(make_configs, monkeypatch):
    prepare_run(make_configs(), None, console=quiet())
    calls, console = tower_calls(monkeypatch), quiet()

    prepare_run(make_configs(), None, console=console)

    assert calls == []
    assert "0 media computed, 7 were there" in said(console)  # that of the held-out document is in both


def test_losses_with_a_filled_cache_are_those_without(make_configs, tmp_path):
    logs = []
    prepare_run(make_configs(), None, console=quiet())
    for name, extra in (("a", []), ("b", ["--vision_cache", "null"])):
        train_run(make_configs("--output_dir", str(tmp_path / name), *extra), quiet())
        lines = (tmp_path / name / "train_log.jsonl").read_text().splitlines()
        logs.append([json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)])

    assert len(logs[0]) == 3
    assert logs[0] == logs[1]


def test_processes_of_a_launcher_share_the_work(make_configs, tmp_path, monkeypatch):
    counts, configs = [], make_configs("--eval_data", "[]")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        prepare_run(configs, None, console=quiet())
        counts.append(len(list((tmp_path / "cache").rglob("*.safetensors"))))

    assert 0 < counts[0] < counts[1] == 6


def test_media_that_do_not_decode_count_towards_the_limit_of_bad_data(make_configs, tmp_path):
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    skip = ("--on_bad_data", "skip", "--max_bad_fraction")

    with pytest.raises(BadDataError, match=r"^1 of 7 rows of 'rows' cannot be used"):
        prepare_run(make_configs(*skip, "0.1"), None, console=quiet())

    prepare_run(make_configs(*skip, "0.2"), None, console=quiet())
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 5


def test_a_medium_that_does_not_decode_is_an_error_unless_asked_otherwise(make_configs, tmp_path):
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])

    with pytest.raises(DocumentError, match=r"rows\.jsonl:3: images: 1\.png"):
        prepare_run(make_configs(), None, console=quiet())


def test_there_must_be_something_to_prepare(make_configs, tmp_path):
    with pytest.raises(ConfigError, match="nothing to prepare: give --output for shards, or --vision_cache"):
        prepare_run(make_configs("--vision_cache", "null"), None, console=quiet())

    result = CliRunner().invoke(app, ["prepare", str(tmp_path / "my.yaml"), "--vision_cache", "null"])
    assert result.exit_code == 2


def test_shards_are_written_by_one_process(make_configs, tmp_path, monkeypatch):
    configs = make_configs()
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match="--output is written by one process"):
        prepare_run(configs, tmp_path / "set", console=quiet())


def test_both_at_once_and_shards_find_what_their_rows_had(make_configs, tmp_path, monkeypatch):
    prepare_run(make_configs(), tmp_path / "set", console=quiet())
    calls = tower_calls(monkeypatch)
    shards = ("--train_data", str(tmp_path / "set"), "--eval_data", "[]")

    train_run(make_configs(*shards), quiet())

    assert calls == []


def test_check_foresees_what_the_cache_takes(make_configs, tmp_path):
    console = quiet()

    check_run(make_configs(), console=console)
    prepare_run(make_configs(), None, console=quiet())

    # Three images, three clips of two time steps, and the image that is measured.
    tokens = 18 + 3 * 2 * 4 + 4
    assert f"({tokens} tokens × 64 numbers × 4 bytes)" in said(console)
    assert "are free there" in said(console)
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    numbers = sum(path.stat().st_size for path in files) - 6 * 300
    assert numbers < tokens * 64 * 4


@pytest.mark.parametrize("tower", ["vision", "merger"])
def test_a_tower_that_trains_is_refused_before_anything_is_read(make_configs, tower):
    with pytest.raises(ConfigError, match=f"train_{tower} changes that. Set train_{tower}: false"):
        make_configs(f"--train_{tower}", "true")


def test_a_type_without_a_cache_is_refused(make_configs):
    with pytest.raises(ConfigError, match="vision_cache_dtype would not be used"):
        make_configs("--vision_cache", "null", "--vision_cache_dtype", "bfloat16")


def test_the_path_starts_at_the_file(make_configs, tmp_path):
    assert Path(str(make_configs().training.vision_cache)).resolve() == tmp_path / "cache"


@pytest.mark.parametrize("as_bytes", ["true", "false"])
def test_the_cache_is_filled_from_bytes_only_where_it_may_be(make_configs, monkeypatch, as_bytes):
    seen = []
    monkeypatch.setattr(
        features_module, "sent", lambda batch, *rest: seen.append(batch) or sent(batch, *rest)
    )

    prepare_run(make_configs("--pixel_bytes", as_bytes), None, console=quiet())

    kinds = {batch["pixel_values"].dtype for batch in seen if "pixel_values" in batch}
    assert kinds == {torch.uint8 if as_bytes == "true" else torch.float32}
