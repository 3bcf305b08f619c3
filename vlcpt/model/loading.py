"""Model and processor, as training and evaluation load them: every tensor, in the type asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLProcessor,
)
from transformers.utils import cached_file

from vlcpt.data.families import family_of
from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.adapters import adapter_folder, check_trained_parts, empty_adapter, load_adapter
from vlcpt.model.attention import BY_DOCUMENT, attend_by_document, attention_for
from vlcpt.model.base import bare_model, check_config_file, check_parameters, only_cached
from vlcpt.model.saved import CONFIGS, check_checkpoint, check_files, not_loaded, without_advice
from vlcpt.model.tuning import apply_tuning
from vlcpt.model.weights import as_load_error, first_few, require_finite_base

if TYPE_CHECKING:
    from peft import PeftModel

    from vlcpt.config.schema import ModelConfig

# Kept out of 4 bits by `qlora`: the small towers, which can then train in full, and the output layer. Each
# pattern is matched from the start of a module's path. Embeddings are no linear layers and stay as well.
UNQUANTISED = ["model.visual", "lm_head"]


def four_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation; stored in the model's own type, so that ZeRO-3 can partition it.

    Example:
        >>> import torch
        >>> four_bits(torch.bfloat16).llm_int8_skip_modules
        ['model.visual', 'lm_head']
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,
        llm_int8_skip_modules=UNQUANTISED,
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights when a model is evaluated on a CPU with AVX512-BF16.

    Version 0.50.2 then rounds the scales to bfloat16, and training after it fails (Linear4bit.forward).
    test_bitsandbytes_still_repacks_weights_for_evaluation fails when this is no longer needed.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.model.loading import load_base
        >>> keep_layout(load_base(str(files("vlcpt") / "demo/base")))  # no 4-bit layer: nothing to do
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def packed_storage(model: nn.Module) -> torch.dtype | None:
    """The type in which a model's 4-bit weights are stored; None if it has none.

    Example:
        >>> packed_storage(nn.Linear(2, 2)) is None
        True
    """
    # By name: bitsandbytes takes a second to import.
    for parameter in model.parameters():
        if type(parameter).__name__ == "Params4bit":
            return parameter.dtype
    return None


def load_processor(name_or_path: str) -> Qwen2_5_VLProcessor:
    """The processor of a Qwen2.5-VL model: its tokenizer with its image and video processors.

    No code from the folder or the Hub is run.

    Raises:
        ConfigError: If nothing can be loaded from there, or it is another model's processor.

    Example:
        >>> from importlib.resources import files
        >>> load_processor(str(files("vlcpt") / "demo/base")).image_token
        '<|image_pad|>'
    """
    cached = only_cached("processor", name_or_path)
    if (config := Path(name_or_path, CONFIGS["model"])).is_file():
        check_config_file(config)  # looked into for the kind of processor
    with as_load_error("processor", name_or_path):
        processor = AutoProcessor.from_pretrained(
            name_or_path, local_files_only=cached, trust_remote_code=False
        )
    if not isinstance(processor, Qwen2_5_VLProcessor):
        raise ConfigError(
            f"{name_or_path} holds a {type(processor).__name__}, not a Qwen2_5_VLProcessor. "
            "Use a folder or id with the complete processor of a Qwen2.5-VL model: beside the tokenizer's "
            "files preprocessor_config.json, as published, or processor_config.json, as saved today."
        )
    return processor


def load_model(config: ModelConfig, *, seed: int = 42) -> PreTrainedModel | PeftModel:
    """The model as training starts from it: on the CPU or, in 4 bits, where its weights are packed.

    ``dtype: auto`` keeps frozen weights in the checkpoint's type; what trains is float32 either way. For a
    GPU that only emulates bfloat16 see :func:`with_native_dtype`.
    The KV cache is off in both configurations, because it would let packed documents see each other.
    ``qlora`` packs the language tower's linear layers only: the vision tower, the merger and the output
    layer stay as they are.

    Args:
        config: What to load, and what of it trains.
        seed: What new adapters are drawn from, and nothing else: torch's own random state neither changes
            them nor is changed. The default is that of ``CPTConfig``; ``vlcpt train`` gives the run's.

    Raises:
        ValueError: If the checkpoint is not there, of another family or incomplete; if the adapter has
            other weights than its configuration says, or trains something else than ``config`` says.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.model.tuning import tower_table
        >>> model = load_model(ModelConfig(model_name_or_path=str(files("vlcpt") / "demo/base"), lora_r=4))
        >>> [row.how for row in tower_table(model)]
        ['frozen', 'frozen', 'LoRA r=4']
    """
    model = _without_cache(config, config.model_name_or_path, in_4_bits=config.tuning == "qlora")
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if config.adapter_name_or_path is None:
            return apply_tuning(model, config)
        tuned = load_adapter(model, config.adapter_name_or_path, is_trainable=True)
    check_trained_parts(tuned, config)
    return tuned


def _without_cache(config: ModelConfig, name_or_path: str, *, in_4_bits: bool = False) -> PreTrainedModel:
    """A model without a KV cache, which would let packed documents see each other."""
    model = load_base(
        name_or_path, dtype=config.dtype, attn_implementation=config.attn_implementation, in_4_bits=in_4_bits
    )
    model.config.use_cache = model.config.get_text_config().use_cache = False
    return model


def load_base(
    name_or_path: str,
    *,
    dtype: str = "auto",
    attn_implementation: str = "auto",
    in_4_bits: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """A model of a supported family with every one of its tensors, nothing frozen or changed yet.

    ``attn_implementation: auto`` is attention by documents, see :mod:`vlcpt.model.attention`.

    Raises:
        ValueError: If it cannot be loaded, is of another family, its tensors are not exactly the model's,
            or one of them is not finite.

    Example:
        >>> from importlib.resources import files
        >>> load_base(str(files("vlcpt") / "demo/base"), dtype="bfloat16").dtype
        torch.bfloat16
    """
    found = read_config(name_or_path, revision=revision)
    check_parameters(found, name_or_path)
    torch_dtype, attention = resolve_dtype(dtype, found), attention_for(found, attn_implementation)
    cached = only_cached("model", name_or_path, revision)
    try:
        # Typed as the model alone; with output_loading_info it is a pair.
        loaded: object = AutoModelForImageTextToText.from_pretrained(
            name_or_path,
            config=found,
            revision=revision,
            local_files_only=cached,
            adapter_kwargs={"local_files_only": cached},  # looks for an adapter in the same place
            dtype=torch_dtype,
            attn_implementation="sdpa" if attention == BY_DOCUMENT else attention,
            quantization_config=four_bits(torch_dtype) if in_4_bits else None,
            trust_remote_code=False,
            output_loading_info=True,
            # Not ignored: reported below, like the other wrong keys.
            ignore_mismatched_sizes=True,
        )
    except (OSError, HfHubHTTPError, SafetensorError, UnpicklingError, RuntimeError) as error:
        raise ValueError(not_loaded("model", name_or_path, error)) from error
    except (ImportError, ValueError) as error:
        asked = f"{attn_implementation}{', 4 bits' if in_4_bits else ''}"
        raise ValueError(not_supported_here(name_or_path, asked, error)) from error
    assert isinstance(loaded, tuple)
    model, info = loaded
    assert isinstance(model, PreTrainedModel)
    if wrong := first_few({kind: sorted(map(str, keys)) for kind, keys in info.items()}):
        raise ValueError(
            f"{name_or_path}: the checkpoint's tensors are not the model's: {wrong}. "
            "Use a complete checkpoint; a part of a model would train from random weights."
        )
    require_finite_base(model, name_or_path, torch_dtype)
    if in_4_bits:
        keep_layout(model)
    if attention == BY_DOCUMENT:
        attend_by_document(model)
    return model


def read_config(name_or_path: str, *, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model of a supported family.

    Raises:
        ConfigError: If there is none, or it is of another family.

    Example:
        >>> from importlib.resources import files
        >>> read_config(str(files("vlcpt") / "demo/base")).model_type
        'qwen2_5_vl'
    """
    cached = only_cached("model", name_or_path, revision)
    with as_load_error("model", name_or_path):
        path = cached_file(name_or_path, CONFIGS["model"], revision=revision, local_files_only=cached)
        if path is not None:
            check_config_file(Path(path))
        found = AutoConfig.from_pretrained(
            name_or_path, revision=revision, local_files_only=cached, trust_remote_code=False
        )
    assert isinstance(found, PreTrainedConfig)
    with wrong_config():
        family_of(found.model_type)
    return found


def with_native_dtype(config: ModelConfig, *, emulates_bf16: bool) -> ModelConfig:
    """A configuration whose ``dtype: auto`` is not bfloat16 on GPUs that only emulate it: float32 there.

    Args:
        emulates_bf16: Whether the model will run on such GPUs; else nothing changes.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config.schema import ModelConfig
        >>> config = ModelConfig(str(files("vlcpt") / "demo/base"), dtype="bfloat16")
        >>> with_native_dtype(config, emulates_bf16=True).dtype  # as it was asked for
        'bfloat16'
    """
    may_change = config.dtype == "auto" and emulates_bf16
    if may_change and resolve_dtype("auto", read_config(config.model_name_or_path)) == torch.bfloat16:
        return replace(config, dtype="float32")
    return config


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


def not_supported_here(name_or_path: str, asked: str, error: Exception) -> str:
    """The message for attention or 4 bits that this machine cannot run.

    Example:
        >>> not_supported_here("org/model", "eager, 4 bits", ImportError("not installed."))
        'org/model: the model cannot be loaded with attn_implementation eager, 4 bits here: not installed.'
    """
    reason = without_advice(str(error).strip())
    return f"{name_or_path}: the model cannot be loaded with attn_implementation {asked} here: {reason}"


def load_for_evaluation(
    config: ModelConfig, checkpoint: str
) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | None]:
    """A trained model as it was in training, and its base where that is not inside it.

    Both are frozen and in evaluation mode. Only the base, ``dtype``, the attention and whether ``tuning`` is
    ``qlora`` are read from ``config``: an adapter is then measured on the 4-bit weights that it was
    trained on. What was trained, and how, is the checkpoint's.

    Args:
        checkpoint: Folder of an adapter, or of a model trained in full or merged; the latter and its base
            are never in 4 bits.

    Returns:
        The model; and None if it is an adapter, to be switched off for the base, or else the base.

    Raises:
        ValueError: If the folder is neither, or a file in it or in the base cannot be loaded.

    Example:
        >>> from importlib.resources import files
        >>> from vlcpt.config.schema import ModelConfig
        >>> base = str(files("vlcpt") / "demo/base")
        >>> trained, before = load_for_evaluation(ModelConfig(base), checkpoint=base)
        >>> before.name_or_path == base
        True
    """
    model, before = load_trained(config, checkpoint), None
    if check_checkpoint(checkpoint) != "adapter":
        before = _without_cache(config, config.model_name_or_path)
        before.requires_grad_(False).eval()
    return model, before


def load_trained(config: ModelConfig, checkpoint: str) -> PreTrainedModel | PeftModel:
    """The model of :func:`load_for_evaluation` alone."""
    if check_checkpoint(checkpoint) == "adapter":
        plain = _without_cache(config, config.model_name_or_path, in_4_bits=config.tuning == "qlora")
        # Trainable, because only then are the copies float32, as they were in training.
        model: PreTrainedModel | PeftModel = load_adapter(plain, checkpoint, is_trainable=True)
    else:
        model = _without_cache(config, checkpoint)
    model.requires_grad_(False).eval()
    return model


# --- without a weight ---


def check_model(config: ModelConfig) -> None:
    """Load and tune the model without its weights, to find errors before the data is read.

    Layers are those of the model itself, without any numbers (on PyTorch's meta device): a second or two
    also for the largest. A folder must have its files. From the Hub only
    configurations are fetched, and an adapter.

    Raises:
        ConfigError: If the model or the adapter is not there, or of another family; if towers, layer names
            or attention are refused; if the adapter trains something else than ``config`` says. The
            messages are those of :func:`load_model`.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> check_model(ModelConfig(base_path(), lora_target_modules=("q_porj",)))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        vlcpt.errors.ConfigError: lora_target_modules names 'q_porj', which matches no layer of language, ...
    """
    adapter = config.adapter_name_or_path
    model = _checked_base(config, config.model_name_or_path)
    with torch.device("meta"), wrong_config():
        if adapter is None:
            apply_tuning(model, config)
        else:
            check_trained_parts(empty_adapter(model, adapter_folder(adapter)), config)


def check_evaluated(config: ModelConfig, checkpoint: str) -> None:
    """Find what would stop a checkpoint or its base from loading, before the data is read.

    Raises:
        ConfigError: If there is neither an adapter nor a model in the folder, or for the base, for the
            reasons of :func:`check_model`.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> check_evaluated(ModelConfig(base_path()), checkpoint=base_path())
    """
    kind = check_checkpoint(checkpoint)
    model = _checked_base(config, config.model_name_or_path)
    if kind == "model":
        _checked_base(config, checkpoint)
        return
    with wrong_config():
        empty_adapter(model, Path(checkpoint))


def _checked_base(config: ModelConfig, name_or_path: str) -> PreTrainedModel:
    found = read_config(name_or_path)
    if Path(name_or_path).is_dir():
        check_files("model", name_or_path)
    with wrong_config():
        check_parameters(found, name_or_path)
    wanted = config.attn_implementation
    try:
        return bare_model(found, "sdpa" if wanted == "auto" else wanted)
    except (ImportError, ValueError) as error:
        raise ConfigError(not_supported_here(name_or_path, wanted, error)) from error
