"""Model and processor, as training and evaluation load them: every tensor, in the type asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Literal

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

from vlcpt.data.families import TOWERS, Tower, base_name, family_of, is_embedding, tower_of
from vlcpt.errors import ConfigError, wrong_config
from vlcpt.model.adapters import (
    adapter_folder,
    check_adapter_tensors,
    check_trained_parts,
    load_adapter,
    new_adapter,
    read_adapter_config,
    read_adapter_settings,
    read_adapter_shapes,
)
from vlcpt.model.attention import attend_by_document
from vlcpt.model.base import bare_model, check_config_file, check_parameters, only_cached
from vlcpt.model.tuning import adapted_layers, apply_tuning, copied_modules, is_tied
from vlcpt.model.weights import (
    CONFIGS,
    UNREADABLE,
    check_checkpoint,
    check_files,
    first_few,
    not_loaded,
    require_finite_base,
    without_advice,
)

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
    try:
        processor = AutoProcessor.from_pretrained(
            name_or_path, local_files_only=cached, trust_remote_code=False
        )
    except (HfHubHTTPError, *UNREADABLE) as error:
        raise ConfigError(not_loaded("processor", name_or_path, error)) from error
    if not isinstance(processor, Qwen2_5_VLProcessor):
        raise ConfigError(
            f"{name_or_path} holds a {type(processor).__name__}, not a Qwen2_5_VLProcessor. "
            "Use a folder or id with the whole processor of a Qwen2.5-VL model: beside the tokenizer's files "
            "preprocessor_config.json, as it is published, or processor_config.json, as it is saved today."
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
        name_or_path,
        dtype=config.dtype,
        attn_implementation=config.attn_implementation,
        in_4_bits=in_4_bits,
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
    torch_dtype = resolve_dtype(dtype, found)
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
            attn_implementation="sdpa" if attn_implementation == "auto" else attn_implementation,
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
    wrong = {kind: sorted(str(key) for key in keys) for kind, keys in info.items()}
    if any(wrong.values()):
        raise ValueError(
            f"{name_or_path}: the checkpoint's tensors are not the model's: {first_few(wrong)}. "
            "Use a complete checkpoint; a part of a model would train from random weights."
        )
    require_finite_base(model, name_or_path, torch_dtype)
    if in_4_bits:
        keep_layout(model)
    if attn_implementation == "auto" and not has_sliding_window(found):
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
    try:
        path = cached_file(name_or_path, CONFIGS["model"], revision=revision, local_files_only=cached)
        if path is not None:
            check_config_file(Path(path))
        found = AutoConfig.from_pretrained(
            name_or_path, revision=revision, local_files_only=cached, trust_remote_code=False
        )
    except ConfigError:
        raise
    except (HfHubHTTPError, *UNREADABLE) as error:
        raise ConfigError(not_loaded("model", name_or_path, error)) from error
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
    if config.dtype != "auto" or not emulates_bf16:
        return config
    if resolve_dtype(config.dtype, read_config(config.model_name_or_path)) != torch.bfloat16:
        return config
    return replace(config, dtype="float32")


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


def has_sliding_window(config: PreTrainedConfig) -> bool:
    """Whether a layer of the language model sees only tokens that are near; no published Qwen2.5-VL has one.

    Attention by documents does not do that, and leaves such a model to PyTorch's own with a mask.

    Example:
        >>> from importlib.resources import files
        >>> has_sliding_window(read_config(str(files("vlcpt") / "demo/base")))
        False
    """
    return "sliding_attention" in (config.get_text_config().layer_types or ())


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

    Both are frozen and in evaluation mode. Of ``config`` only the base, ``dtype``, the attention and
    whether ``tuning`` is ``qlora`` are used: an adapter is then measured on the 4-bit weights that it was
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
    base, before = config.model_name_or_path, None
    if check_checkpoint(checkpoint) == "adapter":
        plain = _without_cache(config, base, in_4_bits=config.tuning == "qlora")
        # Trainable, because only then are the copies float32, as they were in training.
        model: PreTrainedModel | PeftModel = load_adapter(plain, checkpoint, is_trainable=True)
    else:
        model, before = _without_cache(config, checkpoint), _without_cache(config, base)
        before.requires_grad_(False).eval()
    model.requires_grad_(False).eval()
    return model, before


# --- without a weight ---


def check_model(config: ModelConfig) -> None:
    """Load and tune the model without its weights, to find errors before the data is read.

    Layers are those of the model itself, without any numbers (on PyTorch's meta device): a second or two
    also for the largest. Of folders it is checked that their files are there. From the Hub only
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
    if adapter is not None and Path(adapter).is_dir():
        check_files("adapter", adapter)
    model = _checked_base(config, config.model_name_or_path)
    with torch.device("meta"), wrong_config():
        if adapter is None:
            apply_tuning(model, config)
        else:
            check_trained_parts(_checked_adapter(model, adapter, is_trainable=True), config)


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
    with torch.device("meta"), wrong_config():
        _checked_adapter(model, checkpoint, is_trainable=False)


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


def _checked_adapter(model: PreTrainedModel, adapter: str, *, is_trainable: bool) -> PeftModel:
    """An adapter without numbers, compared with the header of its file."""
    config = read_adapter_config(adapter)
    tuned = new_adapter(model, config, is_trainable=is_trainable, name_or_path=adapter)
    check_adapter_tensors(tuned, adapter, read_adapter_shapes(adapter_folder(adapter)))
    return tuned


@dataclass(frozen=True)
class TowerParameters:
    """Parameters of a tower.

    Args:
        how: How it trains.
        frozen: Those that do not train.
        trained: Those that do: its own, copies of them, or its adapters'.
        packed: Of the frozen ones, those held in 4 bits.
        trained_head: Of the trained ones, those of the output layer.
    """

    how: Literal["frozen", "lora", "full"]
    frozen: int
    trained: int
    packed: int = 0
    trained_head: int = 0


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """The model that training starts from in its type, without a weight and before anything is tuned.

    Raises:
        ConfigError: As ``load_model`` does, for what shows without weights.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> empty_model(ModelConfig(base_path(), dtype="bfloat16")).dtype
        torch.bfloat16
    """
    found = read_config(config.model_name_or_path)
    # Attention makes no parameters, and flash attention is refused where its package is missing.
    model = bare_model(found)
    nn.Module.to(model, resolve_dtype(config.dtype, found))  # transformers hides the type of its own
    return model


def count_towers(model: PreTrainedModel, config: ModelConfig) -> dict[Tower, TowerParameters]:
    """Parameters of each tower as training would hold them, counted without peft, which takes long to import.

    Args:
        model: The base, on the meta device.
        config: What trains of it, and how.

    Raises:
        ConfigError: For layers that cannot be adapted, or a saved adapter that cannot be read.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> from vlcpt.demo import base_path
        >>> config = ModelConfig(base_path(), lora_r=4)
        >>> {tower: found.how for tower, found in count_towers(empty_model(config), config).items()}
        {'vision': 'frozen', 'merger': 'frozen', 'language': 'lora'}
    """
    if config.tuning == "full":
        apply_tuning(model, config)
    else:
        model.requires_grad_(False)
    found = [(name, one.numel(), one.requires_grad) for name, one in model.named_parameters()]
    with wrong_config():
        found += [(name, count, True) for name, count in _added_parameters(model, config)]
    packed = set()
    if config.tuning == "qlora":
        packed = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    tied = is_tied(model, family_of(model.config.model_type))
    counts: dict[Tower, TowerParameters] = {}
    for tower in TOWERS:
        frozen = {name: count for name, count, trains in found if tower_of(name) == tower and not trains}
        trained = [(name, count) for name, count, trains in found if tower_of(name) == tower and trains]
        has_adapter = any(".lora_" in name for name, _ in trained)
        in_full = any(".lora_" not in name and not is_embedding(name) for name, _ in trained)
        in_4_bits = {
            name for name in packed & frozen.keys() if tower == "language" and not is_embedding(name)
        }
        counts[tower] = TowerParameters(
            how="lora" if has_adapter else "full" if in_full else "frozen",
            frozen=sum(frozen.values()),
            trained=sum(count for _, count in trained),
            packed=sum(frozen[name] for name in in_4_bits),
            # The output layer makes the logits, or the embeddings that are tied to it.
            trained_head=sum(n for name, n in trained if is_embedding(name) and (tied or "lm_head" in name)),
        )
    return counts


def _added_parameters(model: PreTrainedModel, config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Names and numbers of what peft puts beside the base: adapters, and copies of what trains in full."""
    if config.tuning == "full":
        return
    if config.adapter_name_or_path is not None:
        family = family_of(model.config.model_type)
        for name, shape in read_adapter_shapes(adapter_folder(config.adapter_name_or_path)).items():
            is_head = base_name(name).startswith(family.embeddings[1]) and ".lora_" not in name
            if not (is_head and is_tied(model, family)):  # saved twice, and held once
                yield name, math.prod(shape)
        return
    pattern = re.compile(adapted_layers(model, config))
    for path, module in model.named_modules():
        if pattern.fullmatch(path):
            rows, columns = module.get_parameter("weight").shape
            magnitudes = rows if isinstance(module, nn.Linear) else columns
            yield f"{path}.lora_A", config.lora_r * (rows + columns) + config.use_dora * magnitudes
    copied = {
        parameter: f"{path}.{name}"
        for path in copied_modules(model, config)
        for name, parameter in model.get_submodule(path).named_parameters()
    }
    for parameter, name in copied.items():
        yield name, parameter.numel()


def adapter_shape(config: ModelConfig) -> tuple[int, bool]:
    """The rank of a run's adapters, and whether they drop some of their input; 0 without adapters.

    Example:
        >>> from vlcpt.config.schema import ModelConfig
        >>> adapter_shape(ModelConfig("base", lora_r=4)), adapter_shape(ModelConfig("base", tuning="full"))
        ((4, False), (0, False))
    """
    if config.tuning == "full":
        return 0, False
    if config.adapter_name_or_path is None:
        return config.lora_r, config.lora_dropout > 0
    found = read_adapter_settings(adapter_folder(config.adapter_name_or_path) / CONFIGS["adapter"])
    return int(str(found.get("r", 8))), bool(found.get("lora_dropout"))
