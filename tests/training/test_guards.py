"""Tests of vlcpt/training/guards.py."""

import pytest
import torch
from accelerate.state import DistributedType
from torch import nn

from tests.ranks import forget_deepspeed
from vlcpt import CPTConfig, CPTTrainer
from vlcpt.config.yaml import load_config
from vlcpt.errors import ConfigError
from vlcpt.model.loading import load_base, packed_storage
from vlcpt.runs import train
from vlcpt.training.guards import check_launch, check_model, check_packed


@pytest.fixture(autouse=True)
def no_engine_stays_behind():
    yield
    forget_deepspeed()


def cpu_config(folder, **settings):
    return CPTConfig(str(folder), use_cpu=True, report_to="none", **settings)


def without_cpu_asked_for(folder, **settings):
    """What a machine with GPUs has in its file, here."""
    args = cpu_config(folder, **settings)
    args.use_cpu = False
    return args


def test_several_gpus_in_one_process_are_refused_with_the_command_to_use(tmp_path):
    args = cpu_config(tmp_path)
    args._n_gpu = 4  # Trainer would take nn.DataParallel

    with pytest.raises(ConfigError, match=r"nn\.DataParallel.* torchrun --nproc_per_node 4 -m vlcpt train"):
        check_launch(args)


def test_processes_that_do_not_find_each_other_are_refused(tmp_path, monkeypatch):
    args = without_cpu_asked_for(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match=r"started 2 processes, but there is no GPU here.*use_cpu: true"):
        check_launch(args)


def test_a_launcher_of_one_process_is_no_reason_to_refuse(tmp_path, monkeypatch):
    args = without_cpu_asked_for(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")

    check_launch(args)


def test_deepspeed_that_would_not_be_used_is_refused_with_the_reason(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="deepspeed zero2 would not be used: use_cpu is set"):
        check_launch(cpu_config(tmp_path, deepspeed="zero2"))
    with pytest.raises(ConfigError, match="deepspeed zero3 would not be used: there is no GPU here"):
        check_launch(without_cpu_asked_for(tmp_path, deepspeed="zero3"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"zero1 would not be used: no launcher.*torchrun --nproc_per_node"):
        check_launch(without_cpu_asked_for(tmp_path, deepspeed="zero1"))


def test_deepspeed_that_is_used_is_passed(tmp_path):
    args = without_cpu_asked_for(tmp_path, deepspeed="zero2")
    args.distributed_state.distributed_type = DistributedType.DEEPSPEED
    try:
        check_launch(args)
    finally:
        args.distributed_state.distributed_type = DistributedType.NO


def test_the_trainer_refuses_them_as_well(tiny_model, tiny_processor, tmp_path):
    args = cpu_config(tmp_path)
    args._n_gpu = 2

    with pytest.raises(ConfigError, match="torchrun --nproc_per_node 2"):
        CPTTrainer(tiny_model, args, processing_class=tiny_processor)


@pytest.mark.parametrize(
    ("stored", "settings", "message"),
    [
        (
            torch.float32,
            {"deepspeed": "zero2", "bf16": True},
            r"as float32.*ZeRO-2 with bf16: true would con",
        ),
        (
            torch.bfloat16,
            {"deepspeed": "zero1", "fp16": True},
            r"destroys them\. Set dtype: float16, or bf16: true",
        ),
        (torch.float16, {"deepspeed": "zero3", "bf16": True}, r"Set dtype: bfloat16, or fp16: true\."),
        (
            torch.bfloat16,
            {"deepspeed": "zero3"},
            r"with bf16: false cannot partition\. Set dtype: float32, or bf16",
        ),
        (
            torch.uint8,
            {"deepspeed": "zero3", "bf16": True},
            r"as uint8.*cannot partition\. Set bnb_4bit_quant_storage to bfloat16\.",
        ),
    ],
)
def test_4_bits_that_an_engine_would_destroy_are_refused(tmp_path, stored, settings, message):
    args = without_fp16_check(tmp_path, **settings)

    with pytest.raises(ConfigError, match=f"tuning: qlora stores 4-bit weights .*{message}"):
        check_packed(stored, args)


def without_fp16_check(folder, *, fp16=False, **settings):
    """fp16 is refused without a GPU, so it is set in DeepSpeed's own configuration."""
    args = cpu_config(folder, **settings)
    if fp16:
        args.hf_deepspeed_config._dtype = torch.float16
    return args


@pytest.mark.parametrize(
    ("stored", "settings"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"deepspeed": "zero2", "bf16": True}),
        (torch.bfloat16, {"deepspeed": "zero2"}),
        (torch.uint8, {"deepspeed": "zero2", "bf16": True}),
        (torch.bfloat16, {"deepspeed": "zero3", "bf16": True}),
        (torch.float32, {"deepspeed": "zero3"}),
    ],
)
def test_4_bits_that_train_are_passed(tmp_path, stored, settings):
    check_packed(stored, cpu_config(tmp_path, **settings))


def test_qlora_with_another_precision_stops_before_data_and_weights(tiny_model_dir, tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("not read\n")
    (tmp_path / "my.yaml").write_text(
        f"model_name_or_path: {tiny_model_dir}\ntuning: qlora\ndtype: float32\ntrain_data: train.jsonl\n"
        "output_dir: out\ndeepspeed: zero2\nbf16: true\nuse_cpu: true\n"
    )
    monkeypatch.setattr(train, "check_launch", lambda args: None)  # it refuses DeepSpeed on this machine
    configs = load_config(tmp_path / "my.yaml", [])

    with pytest.raises(ConfigError, match=r"stores 4-bit weights as float32.*Set dtype: bfloat16"):
        train.train_run(configs)


def test_a_model_in_4_bits_without_adapters_is_refused(tiny_model_dir, tiny_processor, tmp_path):
    model = load_base(str(tiny_model_dir), in_4_bits=True)
    assert packed_storage(model) == torch.float32

    with pytest.raises(ConfigError, match=r"weights in 4 bits cannot train in full.*tuning: qlora"):
        CPTTrainer(model, cpu_config(tmp_path), processing_class=tiny_processor)


def test_a_model_spread_over_devices_is_refused_on_several_processes(
    tiny_model, tiny_processor, tmp_path, monkeypatch
):
    tiny_model.hf_device_map = {"model.visual": 0, "model.language_model": 1}
    monkeypatch.setattr(CPTConfig, "world_size", 2)

    with pytest.raises(ConfigError, match=r"lies on 2 devices \(device_map\), but each of 2 processes"):
        CPTTrainer(tiny_model, cpu_config(tmp_path), processing_class=tiny_processor)


def test_trained_weights_of_16_bits_are_refused_with_what_to_do(make_tiny_model, tiny_processor, tmp_path):
    args = cpu_config(tmp_path)
    message = r"trained weights are bfloat16, which loses .*vlcpt\.load_model.*or call model\.float\(\)"

    with pytest.raises(ConfigError, match=message):
        CPTTrainer(make_tiny_model(dtype=torch.bfloat16), args, processing_class=tiny_processor)

    mixed = make_tiny_model(dtype=torch.bfloat16).requires_grad_(False)
    mixed.lm_head.float().requires_grad_(True)
    CPTTrainer(mixed, args, processing_class=tiny_processor)  # what does not train may be as it is
    mixed.model.visual.merger.requires_grad_(True)
    with pytest.raises(ConfigError, match=message):
        CPTTrainer(mixed, args, processing_class=tiny_processor)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_trained_weights_of_16_bits_are_passed_where_deepspeed_keeps_masters(tmp_path, stage):
    model = nn.Linear(2, 2, dtype=torch.bfloat16)

    check_model(model, cpu_config(tmp_path, deepspeed=stage, bf16=True))
    with pytest.raises(ConfigError, match="trained weights are bfloat16"):
        check_model(model, cpu_config(tmp_path, deepspeed=stage))


def test_deepspeed_without_float32_masters_is_refused(tmp_path):
    config = {
        "zero_optimization": {"stage": 2},
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
    }

    with pytest.raises(ConfigError, match=r"bf16\.bf16_master_weights_and_grads would train without float32"):
        check_launch(cpu_config(tmp_path, deepspeed=config, bf16=True))
