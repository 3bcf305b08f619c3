"""Tests of vlcpt/training/checkpoints/resume.py."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.support import FOUR, make_trainer
from vlcpt import CPTConfig, CPTDataset, CPTTrainer, ModelConfig, load_model
from vlcpt.model.tuning import apply_tuning
from vlcpt.training.checkpoints.files import CheckpointError, require_states
from vlcpt.training.checkpoints.resume import (
    StepSeeds,
    check_adapter,
    check_optimizer,
    restore_weights,
)
from vlcpt.training.checkpoints.upstream import quiet_partial_load


def changed(model, reference):
    """How many tensors differ."""
    expected = reference.state_dict()
    return sum(not torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def saved(make_tiny_model, tmp_path):
    """A model whose every tensor is another than in a fresh one, and its folder."""
    model = make_tiny_model(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


def test_every_tensor_is_restored(saved, make_tiny_model):
    model, folder = saved
    fresh = make_tiny_model()
    assert changed(fresh, model) == 57

    restore_weights(fresh, str(folder))

    assert changed(fresh, model) == 0


def test_weights_are_restored_into_the_types_they_had(make_tiny_model, tmp_path):
    """What trains is float32 beside bfloat16, and not a bit of it may be lost."""
    model = make_tiny_model(seed=1, dtype=torch.bfloat16)
    model.lm_head.float()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-5)
    model.save_pretrained(tmp_path)
    fresh = make_tiny_model(dtype=torch.bfloat16)
    fresh.lm_head.float()

    restore_weights(fresh, str(tmp_path))

    assert changed(fresh, model) == 0
    assert fresh.lm_head.weight.dtype == torch.float32
    assert not torch.equal(fresh.lm_head.weight, fresh.lm_head.weight.bfloat16().float())


def test_tied_weights_stay_tied(make_tiny_model, tmp_path):
    model = make_tiny_model(tie=True, seed=1)
    model.save_pretrained(tmp_path)
    fresh = make_tiny_model(tie=True)

    restore_weights(fresh, str(tmp_path))

    assert changed(fresh, model) == 0
    assert fresh.lm_head.weight is fresh.model.language_model.embed_tokens.weight


def edit_tensors(path, edit):
    """Change the tensors of a file."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


EDITS = {
    r"1 missing \(.*up_proj": lambda tensors: tensors.pop(next(n for n in tensors if "up_proj" in n)),
    r"1 unexpected \(.*other": lambda tensors: tensors.update(
        {next(iter(tensors)) + ".other": torch.ones(1)}
    ),
    r"1 of another shape \(.*up_proj": lambda tensors: tensors.update(
        {next(n for n in tensors if "up_proj" in n): torch.ones(3, 5)}
    ),
}


@pytest.mark.parametrize("message", EDITS)
def test_a_full_checkpoint_with_other_tensors_is_refused_by_name(saved, make_tiny_model, message):
    _, folder = saved
    edit_tensors(folder / "model.safetensors", EDITS[message])

    with pytest.raises(CheckpointError, match=message):
        restore_weights(make_tiny_model(), str(folder))


@pytest.mark.parametrize("message", EDITS)
def test_an_adapter_with_other_tensors_is_refused_by_name(make_tiny_model, tmp_path, message):
    tuned = apply_tuning(make_tiny_model(), ModelConfig("base"))
    tuned.save_pretrained(tmp_path)
    check_adapter(tuned, str(tmp_path))
    edit_tensors(tmp_path / "adapter_model.safetensors", EDITS[message])

    with pytest.raises(CheckpointError, match=message):
        check_adapter(tuned, str(tmp_path))


def test_trainer_alone_still_restores_one_tensor(saved, make_tiny_model, tmp_path):
    """When this fails, transformers restores full checkpoints itself: restore_weights can go."""
    model, folder = saved
    fresh = make_tiny_model()
    arguments = TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to="none")

    with quiet_partial_load():
        Trainer(fresh, arguments)._load_from_checkpoint(str(folder))

    assert changed(fresh, model) == 56


def test_resuming_does_not_warn_of_tensors_that_were_restored(
    tiny_model_dir, tiny_processor, tmp_path, caplog
):
    dataset = CPTDataset(FOUR, tiny_processor, max_length=256)
    settings = {"save_strategy": "steps", "save_steps": 1}
    first = load_model(ModelConfig(str(tiny_model_dir), tuning="full"))
    make_trainer(first, dataset, tiny_processor, tmp_path, max_steps=1, **settings).train()

    logging.getLogger("transformers").propagate = True
    try:
        second = load_model(ModelConfig(str(tiny_model_dir), tuning="full"))
        trainer = make_trainer(second, dataset, tiny_processor, tmp_path, max_steps=2, **settings)
        with caplog.at_level(logging.WARNING):
            trainer.train(resume_from_checkpoint=True)
    finally:
        logging.getLogger("transformers").propagate = False

    assert trainer.state.global_step == 2
    assert not [record for record in caplog.records if "checkpoint model" in record.getMessage()]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_tensor_of_the_best_checkpoint_is_loaded_at_the_end(
    tiny_model_dir, tiny_processor, tmp_path, tuning
):
    """Trainer's own loading of it has the same fault as its resume."""
    dataset = CPTDataset(FOUR, tiny_processor, max_length=256)
    model = load_model(ModelConfig(str(tiny_model_dir), tuning=tuning))
    weights = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            weights[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}

    trainer = make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        eval_dataset=dataset,
        callbacks=[Keep()],
        max_steps=3,
        learning_rate=1e-2,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the best is the first
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )

    trainer.train()

    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    final = dict(model.named_parameters())
    assert all(torch.equal(final[name], kept) for name, kept in weights[1].items())
    assert not all(torch.equal(final[name], kept) for name, kept in weights[3].items())


def test_each_step_and_rank_has_random_numbers_of_its_own(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")

    def numbers(step):
        StepSeeds().on_step_begin(arguments, TrainerState(global_step=step), TrainerControl())
        return tuple(torch.rand(4).tolist())

    assert numbers(3) == numbers(3)
    assert len({numbers(step) for step in range(20)}) == 20


def test_a_full_model_on_a_bfloat16_base_is_saved_to_load_as_it_was_trained(
    make_tiny_model, tiny_processor, tmp_path
):
    """A plain from_pretrained reads the type from config.json, and must not round trained weights."""
    model = make_tiny_model(dtype=torch.bfloat16)
    apply_tuning(model, ModelConfig("base", tuning="full"))
    rows = [{"text": "one <trainable_text>two</trainable_text>"}]
    dataset = CPTDataset(rows, tiny_processor, max_length=64)
    args = CPTConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, dataloader_num_workers=0)
    CPTTrainer(model, args, train_dataset=dataset, processing_class=tiny_processor).train()

    name = "model.language_model.layers.0.mlp.up_proj.weight"
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-1")
    assert loaded.state_dict()[name].dtype == torch.float32
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    assert loaded.config.get_text_config().use_cache  # off in training only


def optimizer_after_a_step(cls=torch.optim.AdamW, **settings):
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = cls([{"params": [weight], "name": "language"}], lr=1e-3, **settings)
    weight.grad = torch.ones(2)
    optimizer.step()
    return optimizer


def test_a_first_learning_rate_that_another_schedule_noted_is_no_other_optimizer(tmp_path):
    """Some schedules of transformers note it in the groups, and others do not."""
    saved = optimizer_after_a_step().state_dict()
    saved["param_groups"][0]["initial_lr"] = 1e-3
    torch.save(saved, tmp_path / "optimizer.pt")

    check_optimizer(tmp_path, optimizer_after_a_step())


def test_a_state_that_is_no_tensor_is_refused_for_optimizers_of_others_too(tmp_path):
    class Other(torch.optim.AdamW):
        """As of another package."""

    Other.__module__ = "elsewhere"
    saved = optimizer_after_a_step(Other).state_dict()
    saved["state"][0]["exp_avg_sq"] = 1.0
    torch.save(saved, tmp_path / "optimizer.pt")

    with pytest.raises(CheckpointError, match="exp_avg_sq of parameter 0 holds negative numbers, or none"):
        check_optimizer(tmp_path, optimizer_after_a_step(Other))


@pytest.mark.parametrize("tag", ["../elsewhere", "global_step3", ""])
def test_states_of_deepspeed_outside_the_checkpoint_are_refused(tmp_path, tag):
    folder = tmp_path / "checkpoint-2"
    (folder / "global_step2").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("trainer_state.json", "rng_state_0.pth"):
        (folder / name).touch()
    (folder / "latest").write_text("global_step2")
    require_states(folder, 2)
    (folder / "latest").write_text(tag)

    with pytest.raises(CheckpointError, match="latest: it names"):
        require_states(folder, 2)
