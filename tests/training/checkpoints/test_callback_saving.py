"""Tests of vlcpt/training/checkpoints/callback.py: how a model is saved."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.processes import run_on_ranks
from tests.support import FOUR, make_trainer
from tests.training import foreseen_sizes
from vlcpt import CPTDataset, ModelConfig, load_model
from vlcpt.training.checkpoints import callback
from vlcpt.training.checkpoints.callback import declare_dtype

TUNED = {
    "full": {"tuning": "full"},
    "full, all towers": {"tuning": "full", "train_vision": True, "train_merger": True},
    "full, bfloat16": {"tuning": "full", "dtype": "bfloat16"},
    "lora": {"tuning": "lora"},
    "lora, embeddings": {"tuning": "lora", "train_embeddings": True},
    "lora, merger in full": {"tuning": "lora", "train_merger": True, "lora_towers": ("language",)},
    "qlora": {"tuning": "qlora"},
}
RUNS = [
    *((name, {}) for name in TUNED),
    *(("full", {"optim": name}) for name in ("adafactor", "sgd", "adamw_bnb_8bit")),
    ("full", {"save_only_model": True}),
    ("lora", {"logging_steps": 1, "max_steps": 40}),
]


@pytest.mark.parametrize(("tuning", "settings"), RUNS, ids=[f"{one}{two or ''}" for one, two in RUNS])
def test_what_a_checkpoint_takes_is_foreseen_within_a_fifth(
    tiny_model_dir, tiny_processor, tmp_path, monkeypatch, tuning, settings
):
    foreseen, needed_bytes = [], callback.needed_bytes

    def noted(*args):
        foreseen.append(needed_bytes(*args))
        return foreseen[-1]

    monkeypatch.setattr(callback, "needed_bytes", noted)
    steps = settings.get("max_steps", 1)
    trainer = make_trainer(
        load_model(ModelConfig(str(tiny_model_dir), **TUNED[tuning])),
        CPTDataset(FOUR, tiny_processor, max_length=256, packing=False),
        tiny_processor,
        tmp_path,
        **({"max_steps": 1, "save_strategy": "steps", "save_steps": steps} | settings),
    )
    trainer.train()

    written = written_bytes(tmp_path / f"checkpoint-{steps}")
    assert len(foreseen) == 1
    assert 0.83 <= foreseen[0] / written <= 1.2


def written_bytes(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def sizes(folder):
    done = run_on_ranks("tests.training.foreseen_sizes", str(folder), timeout=580)
    assert done.returncode == 0, done.stdout
    return json.loads((folder / "sizes.json").read_text())


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", foreseen_sizes.RUNS)
def test_what_a_checkpoint_of_two_processes_takes_is_foreseen_within_a_fifth(sizes, name):
    foreseen, written = sizes[name]

    assert 0.83 <= foreseen / written <= 1.2


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TYPES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, F32), (F32, BF16, F32)]


@pytest.mark.parametrize(("most", "one", "expected"), [*TYPES, (BF16, F16, F32)])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_config_says_a_type_that_holds_all_that_was_saved(
    make_tiny_model, tmp_path, most, one, expected, shards
):
    model = make_tiny_model(seed=1, dtype=most)
    model.lm_head.to(one)
    size = sum(tensor.nbytes for tensor in model.state_dict().values()) // shards
    model.save_pretrained(tmp_path, max_shard_size=size + 100_000 * (shards == 1))
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float64"
    (tmp_path / "config.json").write_text(json.dumps(config))

    declare_dtype(tmp_path)

    loaded = type(model).from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {expected}
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(expected))
        assert torch.equal(loaded.state_dict()[name].to(tensor.dtype), tensor)  # nothing is rounded


def test_the_old_key_of_a_published_base_is_corrected_and_no_second_one_added(make_tiny_model, tmp_path):
    make_tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part.pop("dtype", None)
    path.write_text(json.dumps({**config, "torch_dtype": "float32"}))

    declare_dtype(tmp_path)

    assert json.loads(path.read_text()) == {**config, "torch_dtype": "bfloat16"}


def test_an_adapters_folder_stays_as_it_is(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")

    declare_dtype(tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]


def test_weights_of_another_kind_in_the_folder_do_not_stop_an_adapter_from_being_saved(
    tiny_model_dir, tiny_processor, tmp_path
):
    trainer = make_trainer(
        load_model(ModelConfig(str(tiny_model_dir))),
        CPTDataset(FOUR, tiny_processor, max_length=256, packing=False),
        tiny_processor,
        tmp_path,
        max_steps=1,
    )
    trainer.train()
    (tmp_path / "pytorch_model.bin").write_bytes(b"of an earlier tool")

    trainer.save_model()

    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "training_args.bin").exists()
