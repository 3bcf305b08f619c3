"""What is refused before it trains: ways of starting, models and settings with other results, or none."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from vlcpt.config import ConfigError, CPTConfig
from vlcpt.data.vision import VisionEncoder
from vlcpt.model.adapters import base_model
from vlcpt.model.four_bits import packed_storage
from vlcpt.training.engine import asked_stage


def check_launch(args: CPTConfig) -> None:
    """Refuse to start where the run would not be the one that was asked for.

    Several GPUs in one process would get ``nn.DataParallel``; processes that do not find each other would
    each train alone, into one folder; a DeepSpeed config that accelerate leaves unused would be missed by
    nobody.

    Raises:
        ConfigError: With how to start the run instead.

    Example:
        >>> check_launch(CPTConfig("out", use_cpu=True, deepspeed="zero2"))
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: deepspeed zero2 would not be used: use_cpu is set. Remove one of them.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process would use nn.DataParallel, which is not supported. Start the "
            f"run with torchrun --nproc_per_node {args.n_gpu} -m vlcpt train …, or set CUDA_VISIBLE_DEVICES."
        )
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and args.world_size == 1:
        raise ConfigError(
            f"a launcher started {started} processes, but there is no GPU here, so each would train alone "
            "and write over the others. Set use_cpu: true to train on CPUs together, or see vlcpt env."
        )
    if not args.deepspeed:
        return
    for name in ("bf16.bf16_master_weights_and_grads", "fp16.fp16_master_weights_and_grads"):
        if args.hf_deepspeed_config.get_value(name):
            raise ConfigError(
                f"deepspeed: {name} would train without float32 masters, and weights of 16 bits lose small "
                "updates. Remove it from the DeepSpeed config."
            )
    assert args.distributed_state is not None
    if args.distributed_state.distributed_type == DistributedType.DEEPSPEED:
        return
    name = args.deepspeed if isinstance(args.deepspeed, str) else "config"
    if args.use_cpu:
        raise ConfigError(f"deepspeed {name} would not be used: use_cpu is set. Remove one of them.")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"deepspeed {name} would not be used: there is no GPU here. Remove deepspeed, or see vlcpt env."
        )
    raise ConfigError(
        f"deepspeed {name} would not be used: no launcher started this process. "
        "Start it with torchrun --nproc_per_node NUMBER_OF_GPUS -m vlcpt train …; 1 is a number as well."
    )


def check_packed(stored: torch.dtype, args: TrainingArguments) -> None:
    """Refuse 4-bit weights that DeepSpeed would convert as if they were numbers, or could not partition.

    Args:
        stored: The type in which they are stored, two to a byte (``bnb_4bit_quant_storage``).
        args: Of the run.

    Raises:
        ConfigError: With the precision to choose.

    Example:
        >>> check_packed(torch.bfloat16, CPTConfig("out", use_cpu=True))  # no DeepSpeed
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        return
    used, stage = config.dtype(), asked_stage(args)
    # Without bf16 or fp16 DeepSpeed converts nothing; no precision converts bytes.
    is_converted = used != torch.float32 and stored not in (used, torch.uint8)
    if not is_converted and (stage != 3 or stored == used):
        return
    names = {torch.bfloat16: "bf16: true", torch.float16: "fp16: true", torch.float32: "bf16: false"}
    what = "would convert, which destroys them" if is_converted else "cannot partition"
    instead = f"dtype: {_name(used)}, or {names[stored]}" if stored in names else None
    raise ConfigError(
        f"tuning: qlora stores 4-bit weights as {_name(stored)}, which DeepSpeed ZeRO-{stage} with "
        f"{names[used]} {what}. Set {instead or f'bnb_4bit_quant_storage to {_name(used)}'}."
    )


def check_model(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse a model in memory that these processes cannot train, or not as they should.

    That is one with 4-bit weights in full, with trained weights of 16 bits, or spread over GPUs.

    Raises:
        ConfigError: With how to load it instead.

    Example:
        >>> check_model(nn.Linear(1, 1), CPTConfig("out", use_cpu=True))
    """
    stored = packed_storage(model)
    if stored is not None:
        if not isinstance(model, PeftModel):
            raise ConfigError(
                "weights in 4 bits cannot train in full. Load the model with tuning: qlora, for adapters on "
                "them, or with tuning: full, without 4 bits."
            )
        check_packed(stored, args)
    _check_masters(model, args)
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1 and args.world_size > 1:
        raise ConfigError(
            f"the model lies on {len(devices)} devices (device_map), but each of {args.world_size} processes "
            "needs it on its own. Load it without device_map, or with vlcpt.load_model."
        )


def _check_masters(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse to train weights of 16 bits, which lose small updates, unless masters in 32 bits take them."""
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None and config.dtype() != torch.float32:
        return  # its optimizer makes masters of whatever it is given
    trained = {one.dtype for one in model.parameters() if one.requires_grad}
    if found := sorted(_name(dtype) for dtype in trained - {torch.float32, torch.float64}):
        raise ConfigError(
            f"the model's trained weights are {', '.join(found)}, which loses small updates. Load it with "
            "vlcpt.load_model, which makes what trains float32, or call model.float() first; bf16: true "
            "still computes in bfloat16."
        )


def check_settings(model: PreTrainedModel | PeftModel, args: CPTConfig) -> None:
    """Refuse settings that would give wrong results, or none.

    Raises:
        ValueError: With what to do instead.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> args = CPTConfig("out", use_cpu=True)
        >>> args.label_smoothing_factor = 0.1
        >>> check_settings(load_model(ModelConfig(base_path())), args)
        Traceback (most recent call last):
        ValueError: label_smoothing_factor does not work with the loss at the targets. Leave it out.
    """
    if args.fsdp:
        raise ValueError("FSDP is not supported. Use DeepSpeed: --deepspeed zero2 or zero3.")
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub would let Trainer push all that lies in output_dir. Leave it to `vlcpt train`, or "
            "call vlcpt.push_adapter after trainer.save_model()."
        )
    for name in ("label_smoothing_factor", "use_liger_kernel", "neftune_noise_alpha", "batch_eval_metrics"):
        if getattr(args, name):
            raise ValueError(f"{name} does not work with the loss at the targets. Leave it out.")
    found = base_model(model).config.vision_config.tokens_per_second
    if found != VisionEncoder.tokens_per_second:
        raise ValueError(
            f"the model has tokens_per_second {found}, but positions are made for "
            f"{VisionEncoder.tokens_per_second}, as every published Qwen2.5-VL has. Correct its config.json."
        )


def require_bounds(model: PreTrainedModel | PeftModel, inputs: Mapping[str, object]) -> None:
    """Refuse a batch in which flash attention would let documents see each other.

    It reads packs off the positions in batches of one row only (transformers 5.24, ``_is_packed_sequence``);
    in others it needs the bounds that ``CPTDataCollator`` gives, and another collator may not.

    Raises:
        ValueError: With what to do instead.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> require_bounds(load_model(ModelConfig(base_path())), {})  # by documents: right without them
    """
    positions = inputs.get("position_ids")
    if (
        not str(base_model(model).config._attn_implementation).startswith("flash_attention")
        or inputs.get("cu_seq_lens_q") is not None
        or inputs.get("attention_mask") is not None
        or not isinstance(positions, torch.Tensor)
        or positions.shape[:2].numel() <= 4  # four rows of positions of a batch of one
    ):
        return
    if bool((positions[0, :, 1:] == 0).any()):
        raise ValueError(
            "a batch has several rows of packed documents but no cu_seq_lens_q: flash attention would let "
            "them see each other. Use CPTDataCollator, attn_implementation: auto, or batches of one row."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
