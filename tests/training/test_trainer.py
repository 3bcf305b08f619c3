"""Tests of vlcpt/training/trainer.py; what it computes is held by tests/invariants."""

import re
from io import BytesIO
from multiprocessing import active_children

import PIL.Image
import pytest
import torch
from accelerate.utils import DummyOptim
from torch.utils.data import Dataset
from transformers import TrainerCallback

from tests.support import FOUR, Gradients, encode_rows, largest_deviation, make_trainer, png
from vlcpt import CPTConfig, CPTDataCollator, CPTDataset, CPTTrainer, ModelConfig, load_model


def make_args(folder, **settings):
    return CPTConfig(output_dir=str(folder), use_cpu=True, report_to="none", **settings)


@pytest.fixture
def dataset(tiny_processor):
    return CPTDataset(FOUR, tiny_processor, max_length=128, packing=False)


def test_fsdp_is_refused_with_what_to_use(tiny_model, tiny_processor, tmp_path):
    args = make_args(tmp_path)
    args.fsdp = True  # the configuration refuses it already

    with pytest.raises(ValueError, match="FSDP is refused: use deepspeed: zero2"):
        CPTTrainer(tiny_model, args, processing_class=tiny_processor)
    with pytest.raises(ValueError, match="FSDP is refused"):
        make_args(tmp_path, fsdp="full_shard")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("use_liger_kernel", True),
        ("neftune_noise_alpha", 5.0),
        ("batch_eval_metrics", True),
    ],
)
def test_what_would_change_the_loss_is_refused(tiny_model, tiny_processor, tmp_path, name, value):
    args = make_args(tmp_path)
    setattr(args, name, value)

    with pytest.raises(ValueError, match=f"{name}: .*Remove the key"):
        CPTTrainer(tiny_model, args, processing_class=tiny_processor)


def test_a_model_that_counts_time_otherwise_is_refused(tiny_model, tiny_processor, tmp_path):
    tiny_model.config.vision_config.tokens_per_second = 4

    with pytest.raises(ValueError, match=r"tokens_per_second 4, but positions are made for 2.*config.json"):
        CPTTrainer(tiny_model, make_args(tmp_path), processing_class=tiny_processor)


def test_a_trainer_needs_a_processor_or_a_collator(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="needs processing_class"):
        CPTTrainer(tiny_model, make_args(tmp_path))


def test_an_optimizer_that_makes_its_own_groups_is_refused(tiny_model, tiny_processor, dataset, tmp_path):
    galore = {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}

    with pytest.raises(
        ValueError, match=r"galore_adamw makes its own parameter groups.*Choose one of: adamw"
    ):
        make_trainer(tiny_model, dataset, tiny_processor, tmp_path, **galore)


class Items(Dataset):
    """Any map-style data set."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def test_a_step_without_targets_is_an_error_that_names_it(tiny_model, tiny_processor, tmp_path):
    one, *_ = encode_rows(FOUR, tiny_processor)
    empty = encode_rows([{"text": "<trainable_text></trainable_text>nothing"}], tiny_processor)[0]
    assert (empty.labels == -100).all()
    args = make_args(tmp_path, gradient_accumulation_steps=2, num_train_epochs=1, save_strategy="no")
    items = Items([one, empty, empty, empty])

    class InOrder(CPTTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return None

    trainer = InOrder(tiny_model, args, train_dataset=items, processing_class=tiny_processor)

    with pytest.raises(ValueError, match="step 2 has no target in any batch, so it has no loss"):
        trainer.train()
    assert trainer.state.global_step == 1  # one batch without targets beside one with some is no error
    assert all(torch.isfinite(p).all() for p in tiny_model.parameters())


def test_a_collator_that_gives_no_loss_weights_weighs_every_target_1(
    make_tiny_model, tiny_processor, dataset, tmp_path
):
    rows = [{**one, "text": re.sub(' weight="[0-9.]+"', "", one["text"])} for one in FOUR]
    unweighted = CPTDataset(rows, tiny_processor, max_length=128, packing=False)
    collate = CPTDataCollator(tiny_processor)

    def without_weights(items):
        batch = collate(items)
        del batch["loss_weights"]
        return batch

    found = []
    for number, (data, collator) in enumerate([(dataset, without_weights), (unweighted, None)]):
        gradients = Gradients()
        settings = {"gradient_accumulation_steps": 4, "max_steps": 1, "save_strategy": "no"}
        args = make_args(tmp_path / str(number), **settings)
        CPTTrainer(
            make_tiny_model(),
            args,
            train_dataset=data,
            data_collator=collator,
            processing_class=None if collator else tiny_processor,
            callbacks=[gradients],
        ).train()
        found.append(gradients.steps[0])

    assert largest_deviation(*found) < 1e-5


def test_each_tower_gets_its_learning_rate(tiny_model_dir, tiny_processor, dataset, tmp_path):
    model = load_model(
        ModelConfig(
            str(tiny_model_dir), lora_r=2, train_merger=True, train_vision=True, train_embeddings=True
        )
    )
    trainer = make_trainer(
        model,
        dataset,
        tiny_processor,
        tmp_path,
        learning_rate=1e-3,
        merger_learning_rate=2e-4,
        vision_learning_rate=0.0,
        weight_decay=0.1,
        gradient_accumulation_steps=4,
        max_steps=1,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    trainer.train()

    groups = trainer.optimizer.param_groups
    rates = {group["name"]: group["initial_lr"] for group in groups}
    assert rates == {"vision": 0.0, "merger": 2e-4, "language": 1e-3, "embeddings": 1e-3}
    grouped = [p for group in groups for p in group["params"]]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(map(id, grouped)) == sorted(map(id, trained.values()))
    moved = {name for name, p in trained.items() if not torch.equal(p, before[name])}
    # Adam's first step is as long as the rate: nothing moves at 0, the merger a fifth as far.
    assert not [name for name in moved if "visual" in name and "merger" not in name]
    furthest = {
        part: max(float((trained[n].detach() - before[n]).abs().max()) for n in moved if part in n)
        for part in ("merger", "language_model.layers")
    }
    assert furthest["merger"] == pytest.approx(2e-4, rel=0.05)
    assert furthest["language_model.layers"] == pytest.approx(1e-3, rel=0.05)


def test_a_schedule_can_be_made_before_deepspeed_has_made_its_own_optimizer(
    tiny_model, tiny_processor, dataset, tmp_path
):
    trainer = make_trainer(tiny_model, dataset, tiny_processor, tmp_path, learning_rate=0.5)
    parameters = [*tiny_model.parameters()]
    trainer.optimizer = DummyOptim(parameters)  # where DeepSpeed's config has an optimizer
    schedule = trainer.create_scheduler(10, torch.optim.SGD(parameters, 0.5))

    assert schedule.get_last_lr() == [0.5]


def test_an_optimizer_in_8_bits_keeps_embeddings_in_32(tiny_model_dir, tiny_processor, dataset, tmp_path):
    from bitsandbytes.optim import GlobalOptimManager

    model = load_model(ModelConfig(str(tiny_model_dir), tuning="full"))
    trainer = make_trainer(model, dataset, tiny_processor, tmp_path, optim="adamw_bnb_8bit")

    groups = trainer.create_optimizer().param_groups

    kept = [module for module, name, found in GlobalOptimManager.get_instance().module_weight_config_triple]
    assert any(module is model.model.language_model.embed_tokens for module in kept)
    assert {group["name"] for group in groups} == {"language", "embeddings"}


def test_frozen_parameters_are_in_no_group(tiny_model_dir, tiny_processor, dataset, tmp_path):
    model = load_model(ModelConfig(str(tiny_model_dir), tuning="full"))
    trainer = make_trainer(model, dataset, tiny_processor, tmp_path)

    groups = trainer.create_optimizer().param_groups

    assert {group["name"] for group in groups} == {"language", "embeddings"}
    assert all(p.requires_grad for group in groups for p in group["params"])


def test_the_cache_is_off_in_both_configurations(tiny_model, tiny_processor, tmp_path):
    """Or the documents of a pack could see each other."""
    tiny_model.config.get_text_config().use_cache = True

    trainer = make_trainer(tiny_model, None, tiny_processor, tmp_path)

    assert trainer.model.config.get_text_config().use_cache is False
    assert not trainer.model.config.use_cache


def test_no_bar_or_printer_of_transformers_writes_beside_ours(tiny_model, tiny_processor, tmp_path):
    for disable_tqdm in (True, False):
        trainer = make_trainer(tiny_model, None, tiny_processor, tmp_path, disable_tqdm=disable_tqdm)

        names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]

        assert "RunProgress" in names
        assert not {"ProgressCallback", "PrinterCallback"} & set(names)


def test_training_lowers_the_loss(tiny_model_dir, tiny_processor, tmp_path):
    model = load_model(ModelConfig(str(tiny_model_dir), train_merger=True))
    packed = CPTDataset(FOUR, tiny_processor, max_length=256)
    trainer = make_trainer(model, packed, tiny_processor, tmp_path, max_steps=30, learning_rate=3e-2)

    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2


def test_after_training_no_loader_worker_is_left(tiny_model, tiny_processor, dataset, tmp_path):
    """Neither those of training nor of evaluation, as in a notebook that goes on."""
    before = active_children()
    seen = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(len(active_children()))

    trainer = make_trainer(
        tiny_model,
        dataset,
        tiny_processor,
        tmp_path,
        max_steps=2,
        dataloader_num_workers=2,
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=1,
        callbacks=[Count()],
    )
    trainer.train()

    assert max(seen) >= len(before) + 4
    assert active_children() == before
    assert trainer.evaluate()["eval_loss"] > 0  # with workers of its own
    assert active_children() == before


def test_a_checkpoint_has_the_processor_and_no_pickled_arguments(
    tiny_model_dir, tiny_processor, dataset, tmp_path
):
    model = load_model(ModelConfig(str(tiny_model_dir)))
    make_trainer(
        model, dataset, tiny_processor, tmp_path, max_steps=1, save_strategy="steps", save_steps=1
    ).train()

    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}

    assert {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"} <= names
    assert {"tokenizer.json", "processor_config.json"} <= names
    assert "training_args.bin" not in names


@pytest.mark.parametrize("as_bytes", [True, False])
def test_pixels_reach_the_model_as_the_processor_makes_them_whether_sent_as_bytes_or_not(
    tiny_model_dir, tiny_processor, tmp_path, as_bytes
):
    model = load_model(ModelConfig(str(tiny_model_dir), dtype="float32"))
    dataset = CPTDataset(FOUR[:1], tiny_processor, max_length=128)
    trainer = make_trainer(model, dataset, tiny_processor, tmp_path, max_steps=1, pixel_bytes=as_bytes)
    seen, collated = [], []
    model.get_base_model().model.visual.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    collate = trainer.data_collator

    class Watched(type(collate)):
        def __call__(self, items):
            collated.append(super().__call__(items))
            return collated[-1]

    collate.__class__ = Watched
    trainer.train()

    picture = PIL.Image.open(BytesIO(png(1)))
    wanted = tiny_processor.image_processor([picture], return_tensors="pt")["pixel_values"]
    assert collated[0]["pixel_values"].dtype == (torch.uint8 if as_bytes else torch.float32)
    assert torch.equal(seen[0], wanted)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of a machine without an accelerator")
def test_no_memory_is_pinned_where_there_is_no_accelerator(tiny_model, tiny_processor, dataset, tmp_path):
    args = CPTConfig(output_dir=str(tmp_path), report_to="none", packing=False, dataloader_num_workers=0)
    assert args.dataloader_pin_memory  # what config.yaml repeats on another machine
    trainer = CPTTrainer(tiny_model, args, train_dataset=dataset, processing_class=tiny_processor)

    assert not trainer.get_train_dataloader().pin_memory
