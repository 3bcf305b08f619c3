"""What is refused before it trains: launches, engines, models, settings; and numbers that go wrong in it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import DistributedType, gather_object
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.config.precision import autocast_type, slow_products
from vlcpt.config.rules import training_rules
from vlcpt.config.training import CPTConfig
from vlcpt.data.encode.vision import VisionEncoder
from vlcpt.errors import ConfigError, refuse
from vlcpt.model.attention import attention_of, describe_kernels
from vlcpt.model.loading import packed_storage
from vlcpt.model.patch_embedding import choose_form, embed_patches
from vlcpt.model.tuning import base_model, limit_checkpointing
from vlcpt.model.weights import first_not_finite, tensors_of
from vlcpt.training.cost import peak_share
from vlcpt.training.loss import warn_of_hooks
from vlcpt.training.progress import RunProgress
from vlcpt.training.ranks import first_rank_only

if TYPE_CHECKING:
    from transformers import Trainer


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
        args: Those of the run.

    Raises:
        ConfigError: With the precision to choose.

    Example:
        >>> check_packed(torch.bfloat16, CPTConfig("out", use_cpu=True))  # no DeepSpeed
    """
    used, stage = converted_type(args) or torch.float32, asked_stage(args)
    if stage is None:
        return
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
    if converted_type(args) is None:  # else DeepSpeed's optimizer makes masters of whatever it is given
        trained = {one.dtype for one in model.parameters() if one.requires_grad}
        if found := sorted(_name(dtype) for dtype in trained - {torch.float32, torch.float64}):
            raise ConfigError(
                f"the model's trained weights are {', '.join(found)}, which loses small updates. Load it "
                "with vlcpt.load_model, which makes what trains float32, or call model.float() first; bf16: "
                "true still computes in bfloat16."
            )
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1 and args.world_size > 1:
        raise ConfigError(
            f"the model lies on {len(devices)} devices (device_map), but each of {args.world_size} processes "
            "needs it on its own. Load it without device_map, or with vlcpt.load_model."
        )


def check_run(model: PreTrainedModel | PeftModel, args: CPTConfig) -> None:
    """Refuse a launch, a model or settings that would give wrong results, or none.

    Raises:
        ValueError: With what to do instead.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> args = CPTConfig("out", use_cpu=True)
        >>> args.bf16_full_eval = True
        >>> check_run(load_model(ModelConfig(base_path())), args)
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: bf16_full_eval: It would round the weights that train, in place. Set ...
    """
    check_launch(args)
    check_model(model, args)
    refuse(training_rules(vars(args)))  # again: they may have been changed since they were made
    if args.push_to_hub:
        raise ValueError(
            "push_to_hub would let Trainer push all that lies in output_dir. Leave it to `vlcpt train`, or "
            "call vlcpt.push_adapter after trainer.save_model()."
        )
    found = base_model(model).config.vision_config.tokens_per_second
    if found != VisionEncoder.tokens_per_second:
        raise ValueError(
            f"the model has tokens_per_second {found}, but positions are made for "
            f"{VisionEncoder.tokens_per_second}, as every published Qwen2.5-VL has. Correct its config.json."
        )


def asked_stage(args: TrainingArguments) -> int | None:
    """The stage of the DeepSpeed config; None without one.

    Example:
        >>> asked_stage(TrainingArguments("out", use_cpu=True)) is None
        True
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is None:
        return None
    return int(config.get_value("zero_optimization.stage", 0))


def converted_type(args: TrainingArguments) -> torch.dtype | None:
    """The 16-bit type to which DeepSpeed converts the weights of a model; None without one.

    Example:
        >>> converted_type(TrainingArguments("out", use_cpu=True)) is None
        True
    """
    config = getattr(args, "hf_deepspeed_config", None)
    dtype = None if config is None else config.dtype()
    return None if dtype == torch.float32 else dtype


def describe_engine(wrapped: nn.Module, processes: int) -> str:
    """What trains, in words.

    Example:
        >>> describe_engine(nn.Linear(1, 1), 1)
        '1 process'
    """
    count = f"{processes} process{'es' if processes > 1 else ''}"
    if (stage := engine_stage(wrapped)) is not None:
        return f"{count}, DeepSpeed ZeRO-{stage}"
    return f"{count}, DDP" if isinstance(wrapped, nn.parallel.DistributedDataParallel) else count


def engine_stage(wrapped: nn.Module) -> int | None:
    """The ZeRO stage of a DeepSpeed engine; None of any other model.

    Example:
        >>> engine_stage(nn.Linear(1, 1)) is None
        True
    """
    if type(wrapped).__name__ != "DeepSpeedEngine":  # by name: deepspeed takes seconds to import
        return None
    stage = wrapped.zero_optimization_stage()  # type: ignore[operator]
    return int(stage)


class EngineCheck(TrainerCallback):
    """Stops a run that has another engine than its configuration asks for; else names engine and kernels.

    Args:
        trainer: The trainer of the run.
        progress: Where engine and kernels are named.
    """

    def __init__(self, trainer: Trainer, progress: RunProgress) -> None:
        self._trainer, self._progress = trainer, progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Compare engine and attention, on each rank's own GPU, with what they should be."""
        wrapped = self._trainer.model_wrapped
        asked = asked_stage(args)
        if engine_stage(wrapped) != asked:
            wanted = "no DeepSpeed" if asked is None else f"DeepSpeed ZeRO-{asked}"
            raise ValueError(
                f"the run has {describe_engine(wrapped, args.world_size)}, but its configuration asks for "
                f"{wanted}. Start it with torchrun or deepspeed, and unset ACCELERATE_USE_DEEPSPEED."
            )
        model = self._trainer.model
        assert isinstance(model, nn.Module)
        if getattr(args, "activation_checkpointing", False):
            limit_checkpointing(model)  # Trainer turns checkpoints on in ``train``
        base = base_model(model)
        dtype = autocast_type(args) or base.lm_head.weight.dtype
        self._progress.peak_share = peak_share(model, args.device, dtype)
        kernels = describe_kernels(base, args.device, dtype)
        wanted = args.patch_embedding if isinstance(args, CPTConfig) else "auto"
        # One choice for all ranks: rounding is another in the other form.
        patches = first_rank_only(args, lambda: choose_form(base, wanted, args.device, dtype))
        embed_patches(base, patches.form)
        if not state.is_world_process_zero:
            return
        warn_of_hooks(base, args.loss_chunk if isinstance(args, CPTConfig) else 0)
        engine = describe_engine(wrapped, args.world_size)
        for line in filter(None, (engine, kernels, patches.reason)):
            self._progress.say(line)
        if (slow := slow_products(args)) is not None:
            self._progress.say(slow, "yellow")


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
        not attention_of(base_model(model)).startswith("flash_attention")
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


_SHOWN = 20  # documents in a message


class NotFiniteError(ValueError):
    """A loss, a gradient or a weight is infinite or not a number."""


class FiniteNumbers(TrainerCallback):
    """Looks at all weights before step 1, the loss of each micro-batch and the gradient's norm of each step.

    A loss that is not finite makes every gradient NaN, so the norm alone shows each rank what any rank saw:
    it costs one look at the device a step, and no collective. DeepSpeed steps inside its backward, so there
    ranks agree on the losses before the last backward of a step, which is the one look: the norm comes as a
    plain number right after.

    Args:
        trainer: Whose numbers they are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._documents: list[list[str]] = []
        self._losses: list[torch.Tensor] = []
        self._norm: torch.Tensor | float | None = None
        clip = trainer.accelerator.clip_grad_norm_

        def clip_and_note(
            parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2
        ) -> torch.Tensor | float | None:
            self._norm = clip(parameters, max_norm, norm_type)
            return self._norm

        # Trainer asks for the norm before each step, and no callback gets it; after clipping it is gone.
        trainer.accelerator.clip_grad_norm_ = clip_and_note

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look at all weights, so that no document is blamed for what came with them.

        Raises:
            NotFiniteError: With the first name.
        """
        model = self._trainer.model
        assert isinstance(model, nn.Module)
        if (name := first_not_finite(tensors_of(model))) is not None:
            raise NotFiniteError(
                f"{name} is not finite before step {state.global_step + 1}, so no document can be trained "
                "on. Look at the files that the model was loaded from, or what changed it since."
            )

    def start_step(self, documents: Sequence[list[str]]) -> None:
        """Note the documents of each micro-batch that this rank is about to use."""
        self._documents, self._losses, self._norm = list(documents), [], None

    def watched(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch; one that is not finite has only NaN gradients.

        Raises:
            NotFiniteError: Under DeepSpeed, if a loss of this step is not finite on any rank.
        """
        value = loss.detach()
        self._losses.append(value)
        accelerator = self._trainer.accelerator
        if self._trainer.is_deepspeed_enabled and accelerator.sync_gradients:
            is_bad = ~torch.stack(self._losses).isfinite().all()
            if accelerator.reduce(is_bad.float(), "sum"):
                self._stop(self._bad_losses())
        # For every finite number this is times exactly 1.
        return loss * (value - value + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look at the norm, which is the same on all ranks."""
        # DeepSpeed 0.19 gives -1 for one that is not finite.
        if self._norm is None or 0 <= float(self._norm) < math.inf:
            return
        bad = self._bad_losses()
        if not any(bad) and self._scales_losses():
            return  # the scaler was too large: it skips the step, and is made smaller
        self._stop(bad)

    def _scales_losses(self) -> bool:
        """Whether 16-bit gradients are scaled, and may overflow."""
        if self._trainer.is_deepspeed_enabled:
            return converted_type(self._trainer.args) == torch.float16
        return self._trainer.accelerator.scaler is not None

    def _bad_losses(self) -> list[str]:
        """What each rank says of its losses that are not finite; empty for one without any."""
        rank = self._trainer.args.process_index
        found = [
            f"the loss is {float(loss)} on rank {rank}, of {_named(documents)}"
            for loss, documents in zip(self._losses, self._documents, strict=False)
            if not bool(loss.isfinite())
        ]
        return gather_object(["; ".join(found)])

    def _stop(self, bad: Sequence[str]) -> None:
        reason = "; ".join(filter(None, bad))
        if not reason:
            mine = _named([name for names in self._documents for name in names])
            everyone = gather_object([mine])
            reason = f"the gradient is not finite, of {'; '.join(everyone)}"
        raise NotFiniteError(
            f"step {self._trainer.state.global_step + 1}: {reason}. Nothing of this step is saved. Look at "
            "these documents (vlcpt inspect), at the learning rates and at dtype. The last checkpoint is of "
            "an earlier step."
        )


def require_finite(model: nn.Module) -> None:
    """Raise if a weight that trains is not finite: such a model must not be saved.

    Raises:
        NotFiniteError: With the first name.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> _ = layer.bias.data.fill_(float("inf"))
        >>> require_finite(layer)
        Traceback (most recent call last):
        vlcpt.training.guards.NotFiniteError: bias is not finite, so this model is not saved. ...
    """
    trained = ((name, one) for name, one in model.named_parameters() if one.requires_grad)
    if (name := first_not_finite(trained)) is not None:
        raise NotFiniteError(
            f"{name} is not finite, so this model is not saved. Lower the learning rate, and resume from the "
            "last checkpoint with --resume_from_checkpoint true."
        )


def _named(documents: Sequence[str]) -> str:
    if not documents:
        return "documents that have no name"
    more = len(documents) - _SHOWN
    return ", ".join(documents[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
