"""What is measured: a checkpoint of any kind, and its base."""

from typing import TYPE_CHECKING, TypeVar

from peft import PeftModel
from transformers import PreTrainedModel

from vlcpt.model.adapter_loading import load_adapter
from vlcpt.model.loading import load_base, turn_cache_off
from vlcpt.model.saved_files import check_checkpoint

if TYPE_CHECKING:
    from vlcpt.config import ModelConfig

Model = TypeVar("Model", bound=PreTrainedModel | PeftModel)


def load_for_evaluation(
    config: "ModelConfig", checkpoint: str
) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | None]:
    """A trained model as it was in training, and its base where that is not inside it.

    Both are frozen and in evaluation mode. Of ``config`` only the base, ``dtype``, the attention and
    whether ``tuning`` is ``qlora`` are used: an adapter is then measured on the 4-bit weights that it was
    trained on. What was trained, and how, is the checkpoint's.

    Args:
        checkpoint: Folder of an adapter, or of a model trained in full or merged; the latter and its base
            are never in 4 bits.

    Returns:
        The model; and None if it is an adapter, to be switched off for the base, or else the base.

    Raises:
        ValueError: If the folder is neither, or something in it or in the base cannot be loaded whole.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config import ModelConfig
        >>> base = str(files("vlcpt") / "demo/base")
        >>> trained, before = load_for_evaluation(ModelConfig(base), checkpoint=base)
        >>> before.name_or_path == base
        True
    """
    if check_checkpoint(checkpoint) == "adapter":
        base = _base(config)
        # Trainable, because only then are the copies float32, as they were in training.
        return _frozen(load_adapter(base, checkpoint, is_trainable=True)), None
    trained = load_base(checkpoint, dtype=config.dtype, attn_implementation=config.attn_implementation)
    turn_cache_off(trained)
    return _frozen(trained), _frozen(_base(config, whole=True))


def _base(config: "ModelConfig", *, whole: bool = False) -> PreTrainedModel:
    """The model before training; ``whole``: not in 4 bits."""
    base = load_base(
        config.model_name_or_path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        in_4_bits=config.tuning == "qlora" and not whole,
    )
    turn_cache_off(base)
    return base


def _frozen(model: Model) -> Model:
    model.requires_grad_(False)
    model.eval()
    return model
