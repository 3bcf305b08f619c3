"""Tests of vlcpt/training/guards.py: the engine on one process; test_guards_layouts.py holds what many do."""

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import TrainerControl, TrainerState

from tests.processes import run_on_ranks
from tests.support import FOUR, avi, make_trainer, png, row
from tests.training.blind_rank import train
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.errors import ConfigError
from vlcpt.training.guards import EngineCheck, describe_engine, engine_stage
from vlcpt.training.progress import RunProgress
from vlcpt.training.step import require_media


class DeepSpeedEngine(nn.Module):
    """Says what DeepSpeed's own class of this name says."""

    def zero_optimization_stage(self):
        return 2


def test_an_engine_is_named_with_its_processes_and_stage():
    assert engine_stage(DeepSpeedEngine()) == 2
    assert describe_engine(DeepSpeedEngine(), 2) == "2 processes, DeepSpeed ZeRO-2"
    assert describe_engine(nn.Linear(1, 1), 1) == "1 process"


def test_an_engine_that_nobody_asked_for_stops_the_run(tiny_model, tiny_processor, tmp_path):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    trainer = make_trainer(tiny_model, dataset, tiny_processor, tmp_path)
    trainer.model_wrapped = DeepSpeedEngine()
    check = EngineCheck(trainer, RunProgress(None, Console(quiet=True)))

    with pytest.raises(ValueError, match=r"has 1 process, DeepSpeed ZeRO-2, but .* asks for no DeepSpeed"):
        check.on_train_begin(trainer.args, TrainerState(), TrainerControl())


def test_a_hook_on_the_output_layer_is_warned_of_once_as_training_begins(
    tiny_model, tiny_processor, tmp_path, caplog
):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=128)
    trainer = make_trainer(tiny_model, dataset, tiny_processor, tmp_path)
    tiny_model.lm_head.register_forward_hook(lambda module, args, output: None)
    state = TrainerState(is_world_process_zero=True)

    trainer.callback_handler.on_train_begin(trainer.args, state, TrainerControl())

    assert caplog.text.count("Set loss_chunk: 0") == 1


TEXT = [row(f"a valve <trainable_text>{number}</trainable_text>") for number in range(4)]
SEEN = [row("<image>a valve", images=[png(0, 56, 56)])]


@pytest.mark.parametrize("tower", ["merger", "vision"])
def test_a_run_that_trains_a_tower_without_media_is_refused(tiny_processor, tower):
    text = CPTDataset(TEXT, tiny_processor, max_length=128)

    with pytest.raises(
        ConfigError, match=f"train_{tower}: true, but no document .* Set train_{tower}: false"
    ):
        require_media([tower, "language"], text)

    require_media(["language"], text)
    require_media([tower], CPTDataset(SEEN, tiny_processor, max_length=128))


def test_a_video_teaches_the_towers_as_an_image_does(tiny_model_dir, tiny_processor, tmp_path):
    model = load_model(ModelConfig(str(tiny_model_dir), train_vision=True, lora_r=4))
    films = [row("<video>a valve", videos=[avi(0, frames=8, width=28, height=28)])]
    dataset = CPTDataset(films, tiny_processor, max_length=128)

    trainer = make_trainer(model, dataset, tiny_processor, tmp_path)

    assert trainer.data_collator.fill_modalities == ("video",)


def test_a_data_set_of_ones_own_may_hold_media_and_is_filled(tiny_model_dir, tiny_processor, tmp_path):
    model = load_model(ModelConfig(str(tiny_model_dir), train_merger=True, lora_r=4))
    planned = CPTDataset(FOUR, tiny_processor, max_length=128)

    trainer = make_trainer(model, None, tiny_processor, tmp_path, eval_dataset=[planned[0]])

    assert trainer.data_collator.fill_modalities == ("image", "video")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_two_ranks_refuse_a_tower_without_media_before_weights_are_read(tiny_model_dir, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tiny_model_dir}\ntuning: full\ntrain_merger: true\ntrain_data: train.jsonl\n"
        "output_dir: out\nuse_cpu: true\nmax_length: 64\ndataloader_num_workers: 0\nmax_steps: 2\n"
    )

    done = run_on_ranks("vlcpt", "train", str(tmp_path / "run.yaml"))

    assert done.returncode != 0
    assert "train_merger: true, but no document that would be trained has an image or a video" in done.stdout
    assert "reducer" not in done.stdout
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
def test_two_ranks_train_on_texts_as_one_does_though_a_tower_waits_for_images(folder):
    """With activation checkpoints, and weight decay, which moves whatever has a gradient."""
    expected = train(folder, str(folder / "base"))

    done = run_on_ranks("tests.training.blind_rank", str(folder))

    assert done.returncode == 0, done.stdout
    before = load_model(ModelConfig(str(folder / "base"), tuning="full")).state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in expected.items())
    for rank in (0, 1):
        found = torch.load(folder / f"blind.{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.allclose(value, expected[name], atol=1e-5), name
            assert "visual" not in name or torch.equal(value, before[name]), name
