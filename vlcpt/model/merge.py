"""A run's result as one model in its base's type, proven by logits before anything is written for good."""

import gc
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from vlcpt.data.families import family_of
from vlcpt.errors import ConfigError
from vlcpt.file_writes import Writing, sync
from vlcpt.folder_locks import hold, require_new, staging_folder
from vlcpt.model.adapters import load_adapter, read_adapter_config
from vlcpt.model.base import base_folders, base_of_run
from vlcpt.model.base_files import BaseFiles, find_base_files, has_processor, set_pixels
from vlcpt.model.loading import load_base, load_processor, read_config, resolve_dtype
from vlcpt.model.saved import check_checkpoint
from vlcpt.model.tuning import is_tied
from vlcpt.model.weights import first_not_finite
from vlcpt.run_files import RECORD, read_log, record_of, run_settings

logger = logging.getLogger(__name__)

# How far the logits of the merged model, as read back from disk, may be from those of base and adapter:
# the norm of the difference over the norm of the logits. A merged weight is rounded once more to the base's
# type, 24, 11 or 8 bits; a wrong merge is off by 0.3 and more.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Merge:
    """The result of a merge.

    Args:
        dtype: That of the merged weights.
        difference: Between the logits of base and adapter and those of the merged model: the norm of the
            difference over the norm of the logits.
        effect: The same of the base's logits, without the adapter: what there was to merge. None of a run
            in full, for which the base's weights are not read.
    """

    dtype: torch.dtype
    difference: float
    effect: float | None


@dataclass(frozen=True)
class _Source:
    """What is merged.

    Args:
        base: Folder or Hub id of the base; None where a run in full does not say it.
        revision: That of the base on the Hub.
        dtype: That of the merged weights; None: of the base's, one by one.
        is_adapter: Whether the checkpoint is one, or a model.
    """

    base: str | None
    revision: str | None
    dtype: torch.dtype | None
    is_adapter: bool


def merge_adapter(
    checkpoint: str | Path,
    output: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "50GB",
) -> Merge:
    """Write a run's result as one model in its base's type, if its logits are the same.

    An adapter is added to its base, and peft is not needed any more. A model trained in full, whose weights
    are saved in float32, is rounded to the type of its base. The base's own processor, tokenizer, generation
    configuration and licence come along, and the run's record, so that the folder can be pushed with the
    complete card. A ``min_pixels`` or ``max_pixels`` of the training is in the processor's configuration.

    The base of an adapter is the one that ``adapter_config.json`` names, in its own precision, not in 4
    bits; a relative path may start at the current directory, the checkpoint or its parent, or be that of
    ``config.yaml`` there. All runs on the CPU, with PyTorch's own attention, in the memory of about one copy
    of the model: each merged weight takes the place of the base's. The check runs a fixed batch of random
    tokens and a random image through what is merged, and through what was read back from the merged files.

    Args:
        checkpoint: Folder of the adapter or the model: a run's, or a checkpoint in it.
        output: Folder to make. It must not exist, or be empty; it appears complete or not at all.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None: the base's.
        max_shard_size: Bytes a file of weights may have, or text such as ``5GB``; the default is that of
            ``save_pretrained``.

    Raises:
        ConfigError: If ``checkpoint`` is neither an adapter nor a model, ``output`` is taken, read-only, or
            being written by another merge, or the base cannot be found, may be one of two folders, or is
            held in 4 or 8 bits.
        ValueError: If the adapter's tensors do not fit the base, or the logits differ.
        WriteError: If the disk is too full. Nothing is written then.

    Example:
        >>> from importlib.resources import files
        >>> merge_adapter(str(files("vlcpt") / "demo/base"), "merged")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: ...base holds a model, and neither it nor the folder above has ...
    """
    checkpoint, output = Path(checkpoint), Path(output)
    require_new(output)
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(f"max_shard_size {max_shard_size!r} is no size: {error} Write 5GB, say.") from error
    source = _find_source(checkpoint, dtype)
    writing = Writing(output, "the merged model", reads=True)
    with writing, _staged(output) as staging:
        has_own = has_processor(checkpoint) or source.base is None
        processor = load_processor(str(checkpoint if has_own else source.base))
        files = find_base_files(source.base or "", source.revision)
        model, before, effect = _merged(source, checkpoint)
        stored = model.dtype
        small = (files or BaseFiles(checkpoint)).size + sum(one.stat().st_size for one in _record(checkpoint))
        writing.needed = model.get_memory_footprint() + small
        writing.require_room()
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        if files is not None:
            files.restore_config(staging)
        for path in staging.iterdir():
            sync(path)
        del model
        gc.collect()  # a model's modules refer to each other
        merge = _compare(before, effect, stored, staging)
        processor.save_pretrained(staging)
        if files is not None:
            files.restore(staging, model=None)
        _copy_record(checkpoint, staging)
        sync(staging)
        if output.exists():
            output.rmdir()
        staging.rename(output)
        sync(output.parent)
    return merge


@contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """An empty folder beside the output, so that the last step is one rename on one file system.

    Raises:
        ConfigError: If another merge writes into this output, with its number and host.
    """
    work = staging_folder(output)
    staging = work / "model"  # not beside the lock, which must not be renamed with it
    try:
        with hold(work, "output", shown=output):
            try:
                if staging.exists():
                    logger.info("removing %s, which a merge left that did not end", staging)
                    shutil.rmtree(staging)
                staging.mkdir()
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        with suppress(OSError):  # another merge's
            work.rmdir()


def _find_source(checkpoint: Path, dtype: str | None) -> _Source:
    """What a checkpoint is, and its base.

    Raises:
        ConfigError: If it is nothing to merge, or its base cannot be found, or is packed.
    """
    if check_checkpoint(str(checkpoint)) == "model":
        found = base_of_run(checkpoint)
        if found is None and dtype is None:
            raise ConfigError(
                f"{checkpoint} holds a model, and neither it nor the folder above has a run's "
                "config.yaml that names its base, so the type to write is not known. Say it with --dtype "
                "bfloat16; a model that is in it already needs no merge."
            )
        return _Source(
            found, None, resolve_dtype(dtype or "auto", read_config(found or str(checkpoint))), False
        )
    file = f"{checkpoint}/adapter_config.json"
    adapter = read_adapter_config(str(checkpoint))
    if not adapter.base_model_name_or_path:
        raise ConfigError(
            f"{file} names no base model. Write its folder or Hub id into base_model_name_or_path."
        )
    folders = list(map(str, base_folders(adapter.base_model_name_or_path, checkpoint)))
    if len(folders) > 1:  # the wrong one would give a wrong model
        raise ConfigError(
            f"{file}: the base model {adapter.base_model_name_or_path!r} may be "
            f"{' or '.join(map(os.path.realpath, folders))}. Write the absolute path of the right one into "
            "base_model_name_or_path."
        )
    base = folders[0] if folders else adapter.base_model_name_or_path
    try:
        config = read_config(base, revision=adapter.revision)
    except ConfigError as error:
        raise ConfigError(
            f"{file}: the base model could not be loaded. If it has moved, correct base_model_name_or_path. "
            f"{error}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"{file}: the base model {base} is saved in few bits, where no adapter can be added exactly. "
            "Write the model that it was made from into base_model_name_or_path."
        )
    if any(settings.get("tuning") == "qlora" for _, settings in run_settings(checkpoint)):
        logger.info(
            "The adapter was trained on 4-bit weights (tuning: qlora). It is merged into, and compared on, "
            "the base's own weights, which those 4 bits only approximate: measure the result with vlcpt eval."
        )
    return _Source(base, adapter.revision, resolve_dtype(dtype, config) if dtype else None, True)


def _record(checkpoint: Path) -> list[Path]:
    """The files that the run left beside its result."""
    run, _ = record_of(checkpoint)
    return [run / name for name in RECORD if (run / name).is_file()]


def _copy_record(checkpoint: Path, folder: Path) -> None:
    """Copy what the run left beside its result, its log up to a checkpoint; limit pixels as the run did."""
    run, step = record_of(checkpoint)
    for path in _record(checkpoint):
        shutil.copyfile(path, folder / path.name)
    if step is not None and (log := folder / "train_log.jsonl").is_file():
        log.write_text("".join(line for line, _ in read_log(run, step)), "utf-8")
    _, settings = next(run_settings(checkpoint), (None, {}))
    limits = (settings.get(name) for name in ("min_pixels", "max_pixels"))
    set_pixels(folder, *(one if isinstance(one, int) else None for one in limits))


def _merged(source: _Source, checkpoint: Path) -> tuple[PreTrainedModel, torch.Tensor, float | None]:
    """The merged model in the type to write; the logits of what is merged, and how far the base's are off."""
    if source.is_adapter:
        base = load_base(str(source.base), revision=source.revision, attn_implementation="sdpa")
        tuned = load_adapter(base, str(checkpoint), is_trainable=False)
        before = check_logits(tuned)
        with tuned.disable_adapter():
            effect = _distance(check_logits(tuned), before)
        model = add_adapter(tuned, source.dtype, tied=is_tied(base))
    else:
        model, effect = load_base(str(checkpoint), attn_implementation="sdpa"), None
        before = check_logits(model)
    if source.dtype is not None:
        for weight in model.parameters():  # one after the other: no second copy of the model
            weight.data = weight.data.to(source.dtype)
    if (name := first_not_finite(model.named_parameters())) is not None:
        raise ValueError(
            f"{name}: the merged weight holds numbers that are not finite, so the adapter or its base is "
            "broken. Merge an earlier checkpoint."
        )
    return model, before, effect


def _distance(logits: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference, over that of the right ones."""
    return float((logits - right).norm() / right.norm())


@torch.no_grad()
def add_adapter(tuned: PeftModel, dtype: torch.dtype | None, *, tied: bool) -> PreTrainedModel:
    """The model that base and adapter make together, one layer after the other in place of the base's.

    What an adapter adds is computed and added in float32 by peft's own code for its kind (LoRA, DoRA,
    rank-stabilised), and rounded once. A module that was trained in full takes the
    place of the base's.

    Args:
        tuned: Base and adapter; neither can be used afterwards.
        dtype: That of the merged layers; None: that of the base's.
        tied: Whether the base's embeddings are one tensor. They stay one, unless the adapter changes one
            of them alone.

    Raises:
        ValueError: If the adapter holds something that cannot be merged.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from vlcpt.demo import base_path
        >>> tuned = get_peft_model(load_base(base_path()), LoraConfig(target_modules=["q_proj"]))
        >>> any("lora" in name for name, _ in add_adapter(tuned, None, tied=False).named_parameters())
        False
    """
    for path, module in tuned.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise ValueError(
                f"{path} is changed by a {type(module).__name__} of peft, which cannot be merged here. "
                "Merge it with peft's merge_and_unload."
            )
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            own = dict(layer.named_parameters(recurse=False))
            for name, parameter in own.items():
                # A new tensor: the one that is there may be that of the other embedding as well.
                wide = parameter.to(torch.float32, copy=True)
                setattr(layer, name, nn.Parameter(wide, requires_grad=False))
            module.merge()
            for name, parameter in own.items():
                merged = layer.get_parameter(name)
                merged.data = merged.data.to(dtype or parameter.dtype)
    model = tuned.unload()
    assert isinstance(model, PreTrainedModel)
    if tied:
        first, second = map(model.get_submodule, family_of(model.config.model_type).embeddings)
        if tied := torch.equal(first.get_parameter("weight"), second.get_parameter("weight")):
            second.weight = first.weight
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = tied
    return model


def _compare(before: torch.Tensor, effect: float | None, dtype: torch.dtype, folder: Path) -> Merge:
    """Read the merged model back, and compare its logits with those before."""
    after = check_logits(load_base(str(folder), attn_implementation="sdpa"))
    merge = Merge(dtype, _distance(after, before), effect)
    tolerance = TOLERANCES[merge.dtype]
    # Written so that NaN fails as well.
    if not merge.difference <= tolerance:
        raise ValueError(
            f"The merged model's logits differ from the run's by {merge.difference:.1e} of their norm; "
            f"at most {tolerance:.0e} is allowed in {merge.dtype}. Nothing was written. "
            "Please report it, with adapter_config.json."
        )
    logger.info(
        "The merged model's logits differ from the run's by %.1e of their norm (at most %.0e in %s)%s.",
        merge.difference,
        tolerance,
        merge.dtype,
        "" if merge.effect is None else f"; the adapter changes the base's by {merge.effect:.1e}",
    )
    if merge.effect is not None and 0 < merge.effect < 2 * merge.difference:
        logger.warning(
            "What the adapter changes is hardly more than what rounding to %s changes, so much of it may be "
            "lost in the merged model. Use base and adapter unmerged, or train on.",
            merge.dtype,
        )
    return merge


@torch.no_grad()
def check_logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Logits of a fixed batch: 48 random tokens around a random image; (1, T, vocabulary), in float32.

    Example:
        >>> from importlib.resources import files
        >>> check_logits(load_base(str(files("vlcpt") / "demo/base"))).shape[:2]
        torch.Size([1, 54])
    """
    config, vision = model.config, model.config.vision_config
    generator = torch.Generator().manual_seed(0)
    start, end = config.vision_start_token_id, config.vision_end_token_id
    media = torch.tensor([start, end, config.image_token_id, config.video_token_id])
    vocabulary = torch.arange(config.get_text_config().vocab_size)
    vocabulary = vocabulary[~torch.isin(vocabulary, media)]
    text = vocabulary[torch.randint(len(vocabulary), (48,), generator=generator)]
    image = torch.tensor([start, *[config.image_token_id] * 4, end])
    input_ids = torch.cat([text[:24], image, text[24:]])[None]  # (1, 54)
    side = 2 * vision.spatial_merge_size  # two by two merged patches: four tokens
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    logits = model.eval()(
        input_ids=input_ids,
        mm_token_type_ids=(input_ids == config.image_token_id).int(),
        pixel_values=torch.randn(side**2, patch_values, generator=generator),
        image_grid_thw=torch.tensor([[1, side, side]]),
        use_cache=False,
    ).logits
    assert isinstance(logits, torch.Tensor)
    return logits.float()
