"""Model and processor, as training loads them: precision, attention, 4 bits, adapters, every tensor."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLProcessor,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from vlcpt.model.families import TOWERS, family_of
from vlcpt.model.four_bits import four_bits, keep_layout
from vlcpt.model.tuning import apply_tuning, finish_tuning, tower_table

if TYPE_CHECKING:
    from vlcpt.config import ModelConfig

logger = logging.getLogger(__name__)


def load_processor(name_or_path: str) -> Qwen2_5_VLProcessor:
    """The processor of a Qwen2.5-VL model: its tokenizer with its image and video processors.

    No code from the folder or the Hub is run.

    Raises:
        ValueError: If nothing can be loaded from there, or it is another model's processor.

    Example:
        >>> from importlib.resources import files
        >>> load_processor(str(files("vlcpt") / "demo/base")).image_token
        '<|image_pad|>'
    """
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(_not_loaded("processor", name_or_path, error)) from error
    if not isinstance(processor, Qwen2_5_VLProcessor):
        raise ValueError(
            f"{name_or_path} holds a {type(processor).__name__}, not a Qwen2_5_VLProcessor. "
            "Use a folder or id with the whole processor of a Qwen2.5-VL model, processor_config.json "
            "included."
        )
    return processor


def load_model(config: "ModelConfig") -> PreTrainedModel | PeftModel:
    """The model as training starts from it: on the CPU or, in 4 bits, where its weights are packed.

    ``dtype: auto`` keeps frozen weights in the checkpoint's type; what trains is float32 either way.
    The KV cache is off in both configurations, because it would let packed documents see each other.
    ``qlora`` packs the language tower's linear layers only: the vision tower, the merger and the output
    layer stay as they are.

    Raises:
        ValueError: If the checkpoint is not there, of another family or incomplete; if the adapter has
            other weights than its configuration says, or trains other towers than ``config`` says.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config import ModelConfig
        >>> model = load_model(ModelConfig(model_name_or_path=str(files("vlcpt") / "demo/base"), lora_r=4))
        >>> [row.how for row in tower_table(model)]
        ['frozen', 'frozen', 'LoRA r=4']
    """
    if config.adapter_name_or_path is not None and config.tuning == "full":
        raise ValueError(
            "adapter_name_or_path goes on with an adapter, but tuning is full. Set tuning: lora or "
            "qlora, or merge the adapter first (vlcpt merge) and train from the result."
        )
    model = load_base(
        config.model_name_or_path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        in_4_bits=config.tuning == "qlora",
    )
    model.config.use_cache = False
    model.config.get_text_config().use_cache = False
    if config.adapter_name_or_path is not None:
        tuned = load_adapter(model, config.adapter_name_or_path, is_trainable=True)
        _check_towers(tuned, config)
        return tuned
    return tune(model, config)


def tune(model: PreTrainedModel, config: "ModelConfig") -> PreTrainedModel | PeftModel:
    """Freeze the model but for what the configuration trains, with new adapters where it wants some."""
    return apply_tuning(
        model,
        tuning=config.tuning,
        train_language=config.train_language,
        train_merger=config.train_merger,
        train_vision=config.train_vision,
        train_embeddings=config.train_embeddings,
        lora_towers=config.lora_towers,
        lora_r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        lora_target_modules=config.lora_target_modules,
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
    )


def load_base(
    name_or_path: str,
    *,
    dtype: str = "auto",
    attn_implementation: str = "auto",
    in_4_bits: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """A model of a supported family with every one of its tensors, nothing frozen or changed yet.

    Raises:
        ValueError: If it cannot be loaded, is of another family, or its tensors are not exactly the model's.

    Example:
        >>> from importlib.resources import files
        >>> load_base(str(files("vlcpt") / "demo/base"), dtype="bfloat16").dtype
        torch.bfloat16
    """
    found = read_config(name_or_path, revision)
    torch_dtype = resolve_dtype(dtype, found)
    try:
        # Typed as the model alone; with output_loading_info it is a pair.
        loaded: object = AutoModelForImageTextToText.from_pretrained(
            name_or_path,
            config=found,
            revision=revision,
            dtype=torch_dtype,
            attn_implementation=resolve_attention(attn_implementation, torch_dtype),
            quantization_config=four_bits(torch_dtype) if in_4_bits else None,
            trust_remote_code=False,
            output_loading_info=True,
            # Not ignored: reported below, like the other wrong keys.
            ignore_mismatched_sizes=True,
        )
    except (OSError, HfHubHTTPError, SafetensorError) as error:
        raise ValueError(_not_loaded("model", name_or_path, error)) from error
    except (ImportError, ValueError) as error:
        asked = f"attn_implementation {attn_implementation}{', 4 bits' if in_4_bits else ''}"
        raise ValueError(f"{name_or_path}: the model cannot be loaded with {asked} here: {error}") from error
    assert isinstance(loaded, tuple)
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    wrong = {kind: sorted(str(key) for key in keys) for kind, keys in info.items()}
    if any(wrong.values()):
        raise ValueError(
            f"{name_or_path}: the checkpoint's tensors are not the model's: {_first_few(wrong)}. "
            "Use a complete checkpoint; a part of a model would train from random weights."
        )
    if in_4_bits:
        keep_layout(model)
    return model


def load_adapter(model: PreTrainedModel, name_or_path: str, *, is_trainable: bool) -> PeftModel:
    """Put a saved adapter on its base model: exactly the tensors that its configuration asks for.

    ``PeftModel.from_pretrained`` only warns about others, and then trains or merges random ones.

    Raises:
        ValueError: If there is no adapter there, or a tensor is missing, unexpected or of another shape.

    Example:
        >>> from importlib.resources import files
        >>> from tempfile import mkdtemp
        >>> base, folder = str(files("vlcpt") / "demo/base"), mkdtemp()
        >>> apply_tuning(load_base(base)).save_pretrained(folder)
        >>> load_adapter(load_base(base), folder, is_trainable=False).active_adapter
        'default'
    """
    try:
        config = PeftConfig.from_pretrained(name_or_path)
        weights = load_peft_weights(name_or_path, device="cpu")
    except (OSError, ValueError, HfHubHTTPError, SafetensorError) as error:
        raise ValueError(_not_loaded("adapter", name_or_path, error)) from error
    config.inference_mode = not is_trainable
    tuned = get_peft_model(model.requires_grad_(False), config)
    assert isinstance(tuned, PeftModel)
    if is_trainable:
        # Before the weights come in: float32 values do not survive a stay in a bfloat16 copy.
        finish_tuning(tuned)
    expected = get_peft_model_state_dict(tuned)
    wrong = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - expected.keys()),
        "of another shape": sorted(
            key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape
        ),
    }
    if any(wrong.values()):
        raise ValueError(
            f"{name_or_path}: the adapter's tensors are not those that its adapter_config.json asks for on "
            f"{model.name_or_path}: {_first_few(wrong)}. Use the base model it was trained on, and the "
            "versions of transformers and peft it was saved with, or save it anew."
        )
    set_peft_model_state_dict(tuned, weights)
    return tuned


def read_config(name_or_path: str, revision: str | None = None) -> PreTrainedConfig:
    """The model's ``config.json``, of a family that is supported."""
    try:
        found = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(_not_loaded("model", name_or_path, error)) from error
    assert isinstance(found, PreTrainedConfig)
    family_of(found.model_type)
    return found


def _check_towers(model: PreTrainedModel | PeftModel, config: "ModelConfig") -> None:
    """An adapter brings its own towers: the configuration must not say something else."""
    wanted = {
        "vision": config.train_vision,
        "merger": config.train_merger,
        # Trained embeddings count as trained parameters of the language tower.
        "language": config.train_language or config.train_embeddings,
    }
    trains = {row.tower: row.trained > 0 for row in tower_table(model)}
    for tower in TOWERS:
        if trains[tower] != wanted[tower]:
            raise ValueError(
                f"{config.adapter_name_or_path}: the adapter "
                f"{'trains' if trains[tower] else 'does not train'} the {tower} tower, but the configuration "
                "says otherwise, and a saved adapter keeps its towers. "
                f"Set train_{tower}: {str(trains[tower]).lower()}."
            )


def resolve_dtype(dtype: str, config: PreTrainedConfig) -> torch.dtype:
    """The type of the frozen weights: the one asked for, or the checkpoint's."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        # A checkpoint says its type in config.json; some say it for the text part only.
        stored = config.dtype or config.get_text_config().dtype or torch.float32
        return getattr(torch, stored) if isinstance(stored, str) else stored
    if dtype not in named:
        raise ValueError(f"dtype is {dtype!r}; it must be auto or one of {', '.join(named)}.")
    return named[dtype]


def resolve_attention(attn_implementation: str, dtype: torch.dtype) -> str:
    """The kernel of attention: flash attention where it can run, else PyTorch's own."""
    if attn_implementation != "auto":
        return attn_implementation
    can_flash = torch.cuda.is_available() and is_flash_attn_2_available()
    return "flash_attention_2" if can_flash and dtype != torch.float32 else "sdpa"


def _not_loaded(what: Literal["model", "processor", "adapter"], name_or_path: str, error: Exception) -> str:
    """The message for something that is not there, or not readable."""
    reason = str(error).strip().split("\n")[0]
    if Path(name_or_path).is_dir():
        held = ", ".join(sorted(p.name for p in Path(name_or_path).iterdir())[:8]) or "nothing"
        return f"{name_or_path}: no {what} could be loaded from this folder, which holds {held}. {reason}"
    return (
        f"{name_or_path}: no such folder, and no {what} of this id could be had from the Hub. "
        f"Check the spelling, and for a private or gated one log in with `hf auth login`. {reason}"
    )


def _first_few(wrong: dict[str, list[str]]) -> str:
    """The kinds of wrong keys with their number and three names of each."""
    return "; ".join(
        f"{len(keys)} {kind.removesuffix('_keys')} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
        for kind, keys in wrong.items()
        if keys
    )
