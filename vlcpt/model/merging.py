"""An adapter into its base model, proven by logits before anything is written for good."""

import logging
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from vlcpt.model.adapter_loading import load_adapter
from vlcpt.model.bases import find_base
from vlcpt.model.loading import load_base, load_processor

logger = logging.getLogger(__name__)

# How far the logits of the merged model, as read back from disk, may be from those of base and adapter:
# the norm of the difference over the norm of the logits. A merged weight is rounded once more to the base's
# type, 24, 11 or 8 bits; a wrong merge is off by 0.3 and more.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def merge_adapter(checkpoint: str | Path, output: str | Path) -> None:
    """Write base and adapter as one model that loads without peft, if its logits are the same.

    The base is the one that ``adapter_config.json`` names, in its own precision, not in 4 bits; a relative
    path may start at the current directory, the checkpoint or its parent, or be that of ``config.yaml``
    there. All runs on the CPU, with PyTorch's own attention. The check
    runs a fixed batch of random tokens and a random image through base and adapter, and through what was
    read back from the merged files. The processor is copied from the checkpoint, else from the base.

    Args:
        checkpoint: Folder of the adapter.
        output: Folder to make. It must not exist, or be empty; it appears complete or not at all.

    Raises:
        ValueError: If ``checkpoint`` is no adapter, the base is not to be had, the adapter's tensors
            do not fit it, ``output`` is taken, or the logits differ; if the base may be one of two folders.

    Example:
        >>> from importlib.resources import files
        >>> merge_adapter(str(files("vlcpt") / "demo/base"), "merged")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ...base holds no adapter_config.json, so there is no adapter to merge. ...
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty. Give a new folder for the merged model.")
    if not (checkpoint / "adapter_config.json").is_file():
        raise ValueError(
            f"{checkpoint} holds no adapter_config.json, so there is no adapter to merge. Give the folder of "
            "a lora or qlora run; a model trained in full needs no merge."
        )
    config = PeftConfig.from_pretrained(str(checkpoint))
    base_name = config.base_model_name_or_path
    if not base_name:
        raise ValueError(
            f"{checkpoint}/adapter_config.json names no base model. Write its folder or Hub id "
            "into base_model_name_or_path."
        )
    base_name = find_base(base_name, checkpoint)
    try:
        base = load_base(base_name, revision=config.revision, attn_implementation="sdpa")
    except ValueError as error:
        raise ValueError(
            f"{checkpoint}/adapter_config.json: the base model could not be loaded. If it has moved, "
            f"correct base_model_name_or_path. {error}"
        ) from error
    tuned = load_adapter(base, str(checkpoint), is_trainable=False)
    has_processor = (checkpoint / "preprocessor_config.json").is_file() or (
        checkpoint / "processor_config.json"
    ).is_file()
    processor = load_processor(str(checkpoint) if has_processor else base_name)

    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the last step is one rename on one file system.
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        _merge_into(tuned, staging)
        processor.save_pretrained(staging)
        staging.chmod(0o755)
        if output.exists():
            output.rmdir()
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _merge_into(tuned: PeftModel, folder: Path) -> None:
    """Merge, save, read back, and compare the logits of what was read with those before."""
    dtype = tuned.dtype
    assert isinstance(dtype, torch.dtype)
    before = check_logits(tuned)
    merged = tuned.merge_and_unload(safe_merge=True)
    assert isinstance(merged, PreTrainedModel)
    merged.save_pretrained(folder)
    after = check_logits(load_base(str(folder), attn_implementation="sdpa"))
    difference = float((after - before).norm() / before.norm())
    tolerance = TOLERANCES[dtype]
    logger.info("Merged logits differ by %.1e of their norm (%s, at most %.0e)", difference, dtype, tolerance)
    # Written so that NaN fails as well.
    if not difference <= tolerance:
        raise ValueError(
            f"The merged model's logits differ from the adapter's by {difference:.1e} of their norm; at most "
            f"{tolerance:.0e} is allowed in {dtype}. Nothing was written. "
            "Please report it, with adapter_config.json."
        )


@torch.no_grad()
def check_logits(model: PreTrainedModel | PeftModel) -> torch.Tensor:
    """Logits of a fixed batch: 48 random tokens around a random image; (1, T, vocabulary), in float32.

    Example:
        >>> from importlib.resources import files
        >>> check_logits(load_base(str(files("vlcpt") / "demo/base"))).shape[:2]
        torch.Size([1, 54])
    """
    config = model.config
    vision = config.vision_config
    generator = torch.Generator().manual_seed(0)
    special = torch.tensor(
        [
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ]
    )
    vocabulary = torch.arange(config.get_text_config().vocab_size)
    vocabulary = vocabulary[~torch.isin(vocabulary, special)]
    text = vocabulary[torch.randint(len(vocabulary), (48,), generator=generator)]
    # Two by two merged patches: four tokens.
    side = 2 * vision.spatial_merge_size
    image = torch.tensor(
        [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    )
    input_ids = torch.cat([text[:24], image, text[24:]])[None]  # (1, 54)
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixel_values = torch.randn(side**2, patch_values, generator=generator)
    device = model.device
    was_training = model.training
    model.eval()
    logits = model(
        input_ids=input_ids.to(device),
        mm_token_type_ids=(input_ids == config.image_token_id).int().to(device),
        pixel_values=pixel_values.to(device),
        image_grid_thw=torch.tensor([[1, side, side]], device=device),
        use_cache=False,
    ).logits
    model.train(was_training)
    assert isinstance(logits, torch.Tensor)
    return logits.float().cpu()
