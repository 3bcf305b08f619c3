"""What other tools call the keys of a configuration, and how a value of theirs is written here.

Each name was read in the file of :data:`SOURCES` that it cites, so that a row can be checked again. Names
that mean the same under the same key are not listed. ``docs/coming-from.md`` and its Chinese twin are printed
from this table.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

File = Mapping[str, object]
"""All that a configuration holds, by key, for the translations that depend on another key."""
Translate = Callable[[object, File], Mapping[str, object]]
"""Gives the lines that stand for a value here, by key; none where it says nothing that a run here needs."""


@dataclass(frozen=True)
class Source:
    """A file of another tool in which names were read.

    Args:
        tool: What people call the tool.
        repository: Its repository on GitHub, or the package.
        path: The file.
        version: The commit or the release.
    """

    tool: str
    repository: str
    path: str
    version: str


@dataclass(frozen=True)
class Synonym:
    """Names that say one thing, and what it is here.

    Args:
        names: Each name, with the keys of :data:`SOURCES` where it was read, between spaces.
        key: Our key; empty where there is none.
        en: What a person needs to know besides; a whole sentence, for the message and the page.
        zh: The same in Chinese, for the page.
        translate: The lines for a value.
    """

    names: Mapping[str, str]
    key: str
    en: str
    zh: str
    translate: Translate


_LLAMA = ("LLaMA-Factory", "hiyouga/LLaMA-Factory")
_SWIFT = ("ms-swift", "modelscope/ms-swift")
_QWEN = ("Qwen's scripts", "QwenLM/Qwen3-VL")
_TRL = ("TRL", "huggingface/trl")
_2U1 = ("2U1", "2U1/Qwen2-VL-Finetune")
_OLD = "swift/llm/argument/base_args"
SOURCES: Mapping[str, Source] = {
    "lf-data": Source(*_LLAMA, "src/llamafactory/hparams/data_args.py", "072bfe2"),
    "lf-info": Source(*_LLAMA, "src/llamafactory/data/parser.py", "01d3ac6"),
    "lf-model": Source(*_LLAMA, "src/llamafactory/hparams/model_args.py", "00577a8"),
    "lf-tune": Source(*_LLAMA, "src/llamafactory/hparams/finetuning_args.py", "00577a8"),
    "lf-train": Source(*_LLAMA, "src/llamafactory/hparams/training_args.py", "00577a8"),
    "lf-yaml": Source(*_LLAMA, "examples/train_full/qwen2_5vl_full_sft.yaml", "3034206"),
    "sw-tuner": Source(*_SWIFT, "swift/arguments/tuner_args.py", "0bb3103"),
    "sw-tuner-3.0": Source(*_SWIFT, "swift/llm/argument/tuner_args.py", "08bd05b"),
    "sw-data": Source(*_SWIFT, f"{_OLD}/data_args.py", "00f5f5d"),
    "sw-info": Source(*_SWIFT, "swift/dataset/dataset_meta.py", "39e3366"),
    "sw-model": Source(*_SWIFT, f"{_OLD}/model_args.py", "00f5f5d"),
    "sw-template": Source(*_SWIFT, f"{_OLD}/template_args.py", "0117bd9"),
    "sw-quant": Source(*_SWIFT, f"{_OLD}/quant_args.py", "0844900"),
    "sw-base": Source(*_SWIFT, "swift/arguments/base_args/base_args.py", "03b920b"),
    "sw-train": Source(*_SWIFT, "swift/trainers/arguments.py", "0037257"),
    "sw-sft": Source(*_SWIFT, "swift/arguments/sft_args.py", "00e9ca8"),
    "sw-docs": Source(*_SWIFT, "docs/source_en/Instruction/Command-line-parameters.md", "0013209"),
    "2u1": Source(*_2U1, "src/params.py", "002220e"),
    "qwen": Source(*_QWEN, "qwen-vl-finetune/qwenvl/train/argument.py", "bf0baef"),
    "qwen-data": Source(*_QWEN, "qwen-vl-finetune/qwenvl/data/__init__.py", "4600926"),
    "qwen-docs": Source(*_QWEN, "qwen-vl-finetune/README.md", "23ec840"),
    "qwen-vl": Source("Qwen's scripts", "QwenLM/Qwen-VL", "finetune.py", "0f31930"),
    "trl": Source(*_TRL, "trl/trainer/sft_config.py", "016013e"),
    "trl-0.16": Source(*_TRL, "trl/trainer/sft_config.py", "a4458af"),
    "trl-model": Source(*_TRL, "trl/trainer/model_config.py", "040e32d"),
    "trl-scripts": Source(*_TRL, "trl/scripts/utils.py", "0167b7d"),
    "hf-4": Source(
        "transformers 4", "huggingface/transformers", "src/transformers/training_args.py", "fd79833"
    ),
    "torchrun": Source("torchrun", "torch", "torch/distributed/run.py", "2.14.1"),
}


# What a value becomes


def _nothing(value: object, file: File) -> File:
    return {}


def _same(key: str) -> Translate:
    return lambda value, file: {} if value is None else {key: value}


def _is(value: object) -> bool:
    """Whether a value says yes, also in quotes as a shell script has it."""
    return value is True or str(value).lower() in ("true", "1")


def _flag(key: str) -> Translate:
    return lambda value, file: {key: _is(value)}


def _opposite(key: str) -> Translate:
    return lambda value, file: {key: not _is(value)}


def _if_true(key: str, meant: object) -> Translate:
    return lambda value, file: {key: meant} if _is(value) else {}


def _chosen(key: str, words: Mapping[str, object]) -> Translate:
    return lambda value, file: {key: words[str(value).lower()]} if str(value).lower() in words else {}


def _listed(value: object) -> list[object]:
    """The items of a list, or of text with commas between them."""
    items = value if isinstance(value, list) else str(value).split(",")
    return [item.strip() if isinstance(item, str) else item for item in items]


def _bits(file: File) -> int | None:
    """In how many bits a file asks for the frozen weights; None for 16 or 32."""
    for name in ("quantization_bit", "quant_bits", "bits"):
        if str(file.get(name)) in ("4", "8"):
            return int(str(file[name]))
    return 4 if _is(file.get("load_in_4bit")) or _is(file.get("q_lora")) else None


def _method(value: object, file: File) -> File:
    word = str(value).lower()
    if word == "lora":
        return {"tuning": "qlora" if _bits(file) == 4 else "lora"}
    return {"tuning": "full"} if word == "full" else {}


def _with_lora(value: object, file: File) -> File:
    return _method("lora" if _is(value) else "full", file)


def _quantized(value: object, file: File) -> File:
    return {"tuning": "qlora"} if _bits(file) == 4 else {}


def _rank(value: object, file: File) -> File:
    lines = {"lora_r": value}
    # LLaMA-Factory's lora_alpha follows the rank where it is not set; ours does not.
    if "finetuning_type" in file and file.get("lora_alpha") is None and isinstance(value, int):
        lines["lora_alpha"] = 2 * value
    return lines


def _modules(value: object, file: File) -> File:
    names = [name for name in _listed(value) if name not in ("all", "all-linear", "DEFAULT", "", None)]
    return {"lora_target_modules": names} if names else {}


def _saved_modules(value: object, file: File) -> File:
    return {"train_embeddings": True} if {"embed_tokens", "lm_head"} & set(map(str, _listed(value))) else {}


def _in_full(file: File) -> File:
    """2U1 trains in full, beside adapters, what is neither frozen nor under vision_lora."""
    if not _is(file.get("lora_enable")):
        return {}
    return {"lora_towers": ["vision", "language"] if _is(file.get("vision_lora")) else ["language"]}


def _freeze_vision(value: object, file: File) -> File:
    if _is(value):  # 2U1 freezes a tower that gets adapters
        return {"train_vision": _is(file.get("vision_lora"))}
    return {"train_vision": True, **_in_full(file)}


def _freeze_merger(value: object, file: File) -> File:
    return {"train_merger": False} if _is(value) else {"train_merger": True, **_in_full(file)}


def _freeze_language(value: object, file: File) -> File:
    return {"train_language": not _is(value) or _is(file.get("lora_enable"))}


_TRAIN_DATA = ("dataset", "data_path", "dataset_use", "dataset_name", "dataset_path")
_MEDIA_ROOTS = ("media_dir", "image_folder", "data_root")
_SHARES = ("interleave_probs", "interleave_prob")


def _first(file: File, names: tuple[str, ...]) -> list[object]:
    """The items of the first of these keys that says something."""
    return next((_listed(file[name]) for name in names if file.get(name)), [])


def _paths(items: list[object]) -> list[str]:
    # ms-swift writes name:subset#count, Qwen's scripts name%percent; here a source is read whole.
    return [re.sub(r"[#%]\d+$", "", str(item)) for item in items if item]


def _train_data(value: object, file: File) -> File:
    """The one line that all keys about the training data make together."""
    paths, roots = _paths(_first(file, _TRAIN_DATA)), _first(file, _MEDIA_ROOTS)
    shares = _first(file, _SHARES)
    sources: list[object] = []
    for number, path in enumerate(paths):
        more: dict[str, object] = {"media_root": roots[0]} if roots else {}
        if len(paths) == len(shares) > 1:
            share = shares[number]
            more["share"] = float(str(share)) if re.fullmatch(r"0?\.\d+", str(share)) else share
        sources.append({"path": path, **more} if more else path)
    return {"train_data": sources} if sources else {}


def _eval_data(value: object, file: File) -> File:
    return {"eval_data": _paths(_listed(value))} if value else {}


def _warmup(value: object, file: File) -> File:
    return {"warmup_steps": value} if isinstance(value, int | float) and 0 <= value < 1 else {}


def _evaluation(value: object, file: File) -> File:
    return {"eval_strategy": "no" if value is False else value}  # YAML reads no as false


_ATTENTION = {
    "auto": "auto",
    "disabled": "eager",
    "eager": "eager",
    "sdpa": "sdpa",
    "fa2": "flash_attention_2",
    "flash_attn": "flash_attention_2",
    "flash_attention_2": "flash_attention_2",
    "fa3": "flash_attention_3",
    "flash_attention_3": "flash_attention_3",
}
_TYPES = {name: name for name in ("auto", "float32", "bfloat16", "float16")}
_OVERLONG = {"delete": "drop", "split": "split"}

_PACKS = (
    "Packs always keep documents apart and have no padding.",
    "打包后的序列始终保持文档互不可见，也没有填充。",
)
_ENCODED = (
    "Documents are encoded while training, in dataloader_num_workers processes, or before by vlcpt prepare.",
    "文档在训练时由 dataloader_num_workers 个进程编码，或事先用 vlcpt prepare 编码。",
)
_FRAMES = (
    "Frames of a video have no limits of their own: min_pixels and max_pixels hold for them too.",
    "视频帧没有单独的上下限：min_pixels 和 max_pixels 同样适用于视频帧。",
)
_SAMPLED = (
    "Frames are chosen by fps, up to max_frames; there is no fixed or least number.",
    "视频按 fps 取帧，最多 max_frames 帧；没有固定帧数，也没有最少帧数。",
)
_DATA = (
    "These are paths of files or folders, or names on the Hub (with split), each read whole: for a name of "
    "dataset_info.json or of data/__init__.py put its file.",
    "这里写的是文件或目录的路径，或 Hub 上的名字（需要 split），每个来源完整读取："
    "dataset_info.json 或 data/__init__.py 里登记的名字要换成文件。",
)
_ROOT = (
    "It is media_root of each source; paths of media start at the data file.",
    "对应每个来源的 media_root；媒体路径默认从数据文件所在目录算起。",
)
_FIXED = (
    "No part is cut off train_data: give eval_data a file.",
    "不会从 train_data 里切分：请给 eval_data 一个文件。",
)
_LIGER = (
    "Its kernels replace the loss that vlcpt computes.",
    "它的内核会替换 vlcpt 计算的损失。",
)
_METHOD = (
    "There is full, lora and qlora, and no other method.",
    "只有 full、lora 和 qlora，没有其他方法。",
)
_QUANT = (
    "4 bits are tuning: qlora, with nf4 and nested quantization; there are no others.",
    "4 bit 就是 tuning: qlora（nf4，双重量化）；没有其他量化方式。",
)
_TARGETS = (
    "What trains of chats is targets of a source: assistant (the default), last or all.",
    "对话里哪些部分参与训练由来源的 targets 决定：assistant（缺省）、last 或 all。",
)
_GONE = ("It is gone from transformers 5, and means nothing here.", "transformers 5 已删除，这里没有作用。")
_LR = ("The merger and the vision tower have their own keys.", "merger 和视觉编码器各有自己的键。")


def _row(
    names: Mapping[str, str], key: str, text: tuple[str, str] = ("", ""), translate: Translate | None = None
) -> Synonym:
    return Synonym(names, key, *text, translate or (_same(key) if key else _nothing))


def _absent(names: Mapping[str, str], en: str, zh: str) -> Synonym:
    return Synonym(names, "", en, zh, _nothing)


SYNONYMS: tuple[Synonym, ...] = (
    # The model, and what of it trains
    _row({"model": "sw-model", "model_id": "2u1"}, "model_name_or_path"),
    _row(
        {"adapters": "sw-base", "lora_weight_path": "2u1"},
        "adapter_name_or_path",
        ("One adapter can be continued.", "只能接着训练一个 adapter。"),
        lambda value, file: {"adapter_name_or_path": _listed(value)[0]} if value else {},
    ),
    _row({"torch_dtype": "sw-model trl-model"}, "dtype", translate=_chosen("dtype", _TYPES)),
    _row(
        {"flash_attn": "lf-model", "attn_impl": "sw-model"},
        "attn_implementation",
        ("auto keeps packs apart and needs no package.", "auto 能隔开各文档，且不需要额外的包。"),
        _chosen("attn_implementation", _ATTENTION),
    ),
    _row(
        {"use_flash_attention_2": "trl-model"},
        "attn_implementation",
        ("auto keeps packs apart and needs no package.", "auto 能隔开各文档，且不需要额外的包。"),
        _if_true("attn_implementation", "flash_attention_2"),
    ),
    _row(
        {"disable_flash_attn2": "2u1"},
        "attn_implementation",
        ("auto keeps packs apart and needs no package.", "auto 能隔开各文档，且不需要额外的包。"),
        lambda value, file: {"attn_implementation": "sdpa" if _is(value) else "flash_attention_2"},
    ),
    _row(
        {
            "finetuning_type": "lf-tune",
            "train_type": "sw-train sw-docs",
            "tuner_type": "sw-base",
            "sft_type": "sw-tuner-3.0",
        },
        "tuning",
        _METHOD,
        _method,
    ),
    _row(
        {"lora_enable": "2u1 qwen", "use_lora": "qwen-vl", "use_peft": "trl-model"},
        "tuning",
        _METHOD,
        _with_lora,
    ),
    _row(
        {
            "quantization_bit": "lf-model",
            "quant_bits": "sw-quant",
            "bits": "2u1",
            "load_in_4bit": "trl-model",
            "q_lora": "qwen-vl",
        },
        "tuning",
        _QUANT,
        _quantized,
    ),
    _absent(
        {
            "quantization_method": "lf-model",
            "quantization_type": "lf-model",
            "double_quantization": "lf-model",
            "quant_method": "sw-quant",
            "bnb_4bit_quant_type": "sw-quant trl-model",
            "bnb_4bit_use_double_quant": "sw-quant",
            "bnb_4bit_compute_dtype": "sw-quant",
            "bnb_4bit_quant_storage": "sw-quant",
            "use_bnb_nested_quant": "trl-model",
            "load_in_8bit": "trl-model",
            "double_quant": "2u1",
            "quant_type": "2u1",
        },
        *_QUANT,
    ),
    _row(
        {"freeze_vision_tower": "lf-tune 2u1"},
        "train_vision",
        ("The vision tower is frozen by default.", "视觉编码器缺省冻结。"),
        _freeze_vision,
    ),
    _row(
        {"freeze_vit": "sw-tuner", "fix_vit": "qwen-vl"},
        "train_vision",
        ("The vision tower is frozen by default.", "视觉编码器缺省冻结。"),
        _opposite("train_vision"),
    ),
    _row({"tune_mm_vision": "qwen"}, "train_vision", translate=_flag("train_vision")),
    _row(
        {"vision_lora": "2u1"},
        "train_vision",
        (
            "Trained towers get adapters, unless lora_towers leaves them out.",
            "训练的部分都用 LoRA，除非 lora_towers 没有列出它。",
        ),
        lambda value, file: {"train_vision": True} if _is(value) else {},
    ),
    _row(
        {"freeze_merger": "2u1"},
        "train_merger",
        ("The merger is frozen by default.", "merger 缺省冻结。"),
        _freeze_merger,
    ),
    _row(
        {"freeze_multi_modal_projector": "lf-tune", "freeze_aligner": "sw-tuner"},
        "train_merger",
        ("The merger is frozen by default.", "merger 缺省冻结。"),
        _opposite("train_merger"),
    ),
    _row({"tune_mm_mlp": "qwen"}, "train_merger", translate=_flag("train_merger")),
    _row(
        {"freeze_llm": "2u1 sw-tuner"},
        "train_language",
        (
            "The language tower trains by default; with lora_enable 2U1 freezes it under its adapters.",
            "语言模型缺省训练；2U1 用 lora_enable 时冻结的是 LoRA 之下的权重。",
        ),
        _freeze_language,
    ),
    _row(
        {"freeze_language_model": "lf-tune"},
        "train_language",
        ("The language tower trains by default.", "语言模型缺省训练。"),
        _opposite("train_language"),
    ),
    _row({"tune_mm_llm": "qwen"}, "train_language", translate=_flag("train_language")),
    _row(
        {"lora_rank": "lf-tune sw-tuner 2u1"},
        "lora_r",
        (
            "lora_alpha is 32 unless set; LLaMA-Factory's is twice the rank.",
            "lora_alpha 缺省为 32；LLaMA-Factory 缺省为 rank 的两倍。",
        ),
        _rank,
    ),
    _row(
        {"lora_target": "lf-tune", "target_modules": "sw-tuner"},
        "lora_target_modules",
        ("Every linear layer of lora_towers is the default.", "缺省为 lora_towers 里的全部线性层。"),
        _modules,
    ),
    _row(
        {"additional_target": "lf-tune", "modules_to_save": "sw-tuner", "lora_modules_to_save": "trl-model"},
        "train_embeddings",
        (
            "Beside adapters only embeddings and output head can train in full.",
            "除 LoRA 外，只有词嵌入和输出层可以整体训练。",
        ),
        _saved_modules,
    ),
    _absent(
        {
            "lora_bias": "2u1 qwen sw-tuner",
            "lora_dtype": "sw-tuner",
            "lora_namespan_exclude": "2u1",
            "num_lora_modules": "2u1",
            "target_regex": "sw-tuner",
            "target_parameters": "sw-tuner",
            "init_weights": "sw-tuner",
            "create_new_adapter": "lf-tune",
            "loraplus_lr_ratio": "lf-tune",
            "lorap_lr_ratio": "sw-tuner",
        },
        "Adapters are shaped by lora_r, lora_alpha, lora_dropout, lora_towers and lora_target_modules alone.",
        "LoRA 只由 lora_r、lora_alpha、lora_dropout、lora_towers 和 lora_target_modules 决定。",
    ),
    _absent(
        {
            "unfreeze_topk_llm": "2u1",
            "unfreeze_topk_vision": "2u1",
            "freeze_trainable_layers": "lf-tune",
            "freeze_trainable_modules": "lf-tune",
            "freeze_extra_modules": "lf-tune",
            "freeze_parameters": "sw-tuner",
            "freeze_parameters_ratio": "sw-tuner",
            "freeze_parameters_regex": "sw-tuner",
            "trainable_parameters": "sw-tuner",
            "trainable_parameters_regex": "sw-tuner",
        },
        "A tower trains whole or not at all: train_language, train_merger, train_vision.",
        "每个部分要么整体训练，要么不训练：train_language、train_merger、train_vision。",
    ),
    _absent(
        {"model_revision": "lf-model sw-model trl-model"},
        "Download that revision into a folder and give it as model_name_or_path.",
        "请先把该版本下载到目录，再写作 model_name_or_path。",
    ),
    _absent(
        {"cache_dir": "lf-model 2u1 qwen", "use_hf": "sw-base"},
        "Models come from the Hub, into the folder of the variable HF_HOME.",
        "模型来自 Hugging Face Hub，缓存目录由环境变量 HF_HOME 决定。",
    ),
    _absent(
        {
            "model_type": "sw-model",
            "model_kwargs": "sw-base",
            "model_init_kwargs": "trl",
            "device_map": "sw-model",
        },
        "The model's own config.json says it.",
        "由模型自己的 config.json 决定。",
    ),
    _absent(
        {
            "rope_scaling": "lf-model sw-model",
            "resize_vocab": "lf-model",
            "add_tokens": "lf-model",
            "new_special_tokens": "sw-docs",
        },
        "The base model is trained as it is: change it before, and give the result as model_name_or_path.",
        "基座模型原样训练：请事先改好，再写作 model_name_or_path。",
    ),
    _absent(
        {"pure_bf16": "lf-tune", "upcast_layernorm": "lf-model", "fp8": "lf-model"},
        "Weights that train are float32; bf16: true computes in bfloat16.",
        "参与训练的权重是 float32；bf16: true 用 bfloat16 计算。",
    ),
    # Data
    _row(
        {
            "dataset": "lf-data sw-data",
            "data_path": "2u1",
            "dataset_use": "qwen",
            "dataset_name": "trl-scripts",
            "dataset_path": "qwen-docs",
        },
        "train_data",
        _DATA,
        _train_data,
    ),
    _row(
        {
            "eval_dataset": "lf-data",
            "val_dataset": "sw-data",
            "eval_path": "2u1",
            "eval_data_path": "qwen-vl",
        },
        "eval_data",
        _DATA,
        _eval_data,
    ),
    _row(
        {"media_dir": "lf-data", "image_folder": "2u1", "data_root": "qwen-docs"},
        "train_data",
        _ROOT,
        _train_data,
    ),
    _absent(
        {"dataset_dir": "lf-data", "custom_dataset_info": "sw-data", "eval_image_folder": "2u1"},
        "Paths start at the YAML file; media at the data file, or at media_root of a source.",
        "路径从 YAML 文件所在目录算起；媒体从数据文件所在目录或来源的 media_root 算起。",
    ),
    _absent(
        {
            "dataset_train_split": "trl-scripts",
            "dataset_test_split": "trl-scripts",
            "dataset_config": "trl-scripts",
            "dataset_text_field": "trl",
            "columns": "sw-docs",
        },
        "It is part of a source: {path, split, format}; fields are those of the format.",
        "写在来源里：{path, split, format}；字段由格式决定。",
    ),
    _row(
        {"interleave_probs": "lf-data", "interleave_prob": "sw-docs"},
        "train_data",
        ("It is share of each source.", "对应每个来源的 share。"),
        _train_data,
    ),
    _absent(
        {"mix_strategy": "lf-data", "stopping_strategy": "sw-docs"},
        "Every document is read once an epoch, more often to meet the share of its source.",
        "每个 epoch 每篇文档至少读一次；为满足来源的 share 会多读。",
    ),
    _absent(
        {"max_samples": "lf-data"},
        "A source is read whole: give a smaller file, or set max_steps.",
        "来源会完整读取：请给更小的文件，或设 max_steps。",
    ),
    _absent({"val_size": "lf-data", "split_dataset_ratio": "sw-data"}, *_FIXED),
    _absent(
        {
            "overwrite_cache": "lf-data",
            "preprocessing_num_workers": "lf-data",
            "preprocessing_batch_size": "lf-data",
            "tokenized_path": "lf-data",
            "streaming": "lf-data sw-data",
            "buffer_size": "lf-data",
            "dataset_num_proc": "sw-data trl",
            "load_from_cache_file": "sw-data",
            "download_mode": "sw-data",
            "lazy_tokenize": "sw-base",
            "cached_dataset": "sw-docs",
            "lazy_preprocess": "2u1",
            "dataset_streaming": "trl-scripts",
            "dataset_kwargs": "trl",
        },
        *_ENCODED,
    ),
    _row(
        {"disable_shuffling": "lf-tune"},
        "train_sampling_strategy",
        (
            "Packs are shuffled anew for each epoch unless it is sequential; documents once in either case.",
            "除非设为 sequential，每个 epoch 都会重新打乱打包后的序列；文档在两种情况下都只打乱一次。",
        ),
        _if_true("train_sampling_strategy", "sequential"),
    ),
    _row(
        {"dataset_shuffle": "sw-docs", "train_dataloader_shuffle": "sw-train"},
        "train_sampling_strategy",
        (
            "Packs are shuffled anew for each epoch unless it is sequential; documents once in either case.",
            "除非设为 sequential，每个 epoch 都会重新打乱打包后的序列；文档在两种情况下都只打乱一次。",
        ),
        lambda value, file: {} if _is(value) else {"train_sampling_strategy": "sequential"},
    ),
    _absent(
        {"strict": "sw-data"},
        "A bad document stops the run unless on_bad_data: skip.",
        "遇到坏文档会停止，除非 on_bad_data: skip。",
    ),
    # Tokens
    _row(
        {
            "cutoff_len": "lf-data",
            "max_seq_length": "2u1 trl-0.16",
            "model_max_length": "qwen",
            "packing_length": "sw-base",
        },
        "max_length",
        ("Longer documents are split, see on_overlong.", "更长的文档会切分，见 on_overlong。"),
    ),
    _row(
        {"truncation_strategy": "sw-template sw-docs"},
        "on_overlong",
        ("Nothing is cut away in silence: split, drop or error.", "不会悄悄截断：split、drop 或 error。"),
        _chosen("on_overlong", _OVERLONG),
    ),
    _absent(
        {"truncation_mode": "trl"},
        "Nothing is cut away in silence: see on_overlong.",
        "不会悄悄截断：见 on_overlong。",
    ),
    _row(
        {"neat_packing": "lf-data", "data_packing": "qwen", "data_flatten": "qwen"},
        "packing",
        _PACKS,
        _if_true("packing", True),
    ),
    _absent(
        {
            "padding_free": "sw-train trl",
            "packing_strategy": "sw-base trl",
            "packing_num_proc": "sw-base",
            "eval_packing": "trl",
            "pad_to_multiple_of": "trl lf-yaml",
            "padding_side": "sw-docs",
        },
        *_PACKS,
    ),
    _absent(
        {
            "template": "lf-data sw-template",
            "system": "sw-template",
            "use_chat_template": "sw-template",
            "chat_template_path": "trl",
            "tool_format": "lf-data",
            "agent_template": "sw-docs",
        },
        "Documents have no chat template; a source of chats keeps the model's own with chat_template: true.",
        "文档不套对话模板；对话来源可用 chat_template: true 保留模型自己的模板。",
    ),
    _absent(
        {
            "train_on_prompt": "lf-data",
            "mask_history": "lf-data",
            "loss_scale": "sw-template",
            "completion_only_loss": "trl",
            "assistant_only_loss": "trl",
        },
        *_TARGETS,
    ),
    _absent(
        {"stage": "lf-tune", "task_type": "sw-docs"},
        "vlcpt does continued pre-training, LLaMA-Factory's stage: pt, and nothing else.",
        "vlcpt 只做继续预训练，即 LLaMA-Factory 的 stage: pt。",
    ),
    # Images and video
    _row(
        {"image_max_pixels": "lf-model 2u1", "MAX_PIXELS": "sw-docs"},
        "max_pixels",
        ("It holds for video frames too.", "同样适用于视频帧。"),
    ),
    _row(
        {"image_min_pixels": "lf-model 2u1", "MIN_PIXELS": "sw-docs"},
        "min_pixels",
        ("It holds for video frames too.", "同样适用于视频帧。"),
    ),
    _absent(
        {
            "video_max_pixels": "lf-model 2u1 qwen-docs",
            "video_min_pixels": "lf-model 2u1 qwen-docs",
            "video_max_frame_pixels": "qwen",
            "video_min_frame_pixels": "qwen",
            "VIDEO_MAX_PIXELS": "sw-docs",
            "VIDEO_MIN_PIXELS": "sw-docs",
            "VIDEO_TOTAL_PIXELS": "sw-docs",
        },
        *_FRAMES,
    ),
    _absent(
        {
            "image_resized_width": "2u1",
            "image_resized_height": "2u1",
            "video_resized_width": "2u1",
            "video_resized_height": "2u1",
        },
        "Media keep their shape: set min_pixels and max_pixels.",
        "媒体保持长宽比：请设 min_pixels 和 max_pixels。",
    ),
    _row({"video_fps": "lf-model qwen-docs", "FPS": "sw-docs"}, "fps"),
    _row({"video_maxlen": "lf-model", "video_max_frames": "qwen", "FPS_MAX_FRAMES": "sw-docs"}, "max_frames"),
    _absent(
        {"nframes": "2u1", "video_min_frames": "qwen", "base_interval": "qwen", "FPS_MIN_FRAMES": "sw-docs"},
        *_SAMPLED,
    ),
    _absent(
        {"use_audio_in_video": "lf-model", "audio_sampling_rate": "lf-model"},
        "The model has no audio.",
        "模型不支持音频。",
    ),
    # Training
    _row(
        {"vit_lr": "sw-train", "vision_lr": "2u1", "vision_tower_lr": "qwen"},
        "vision_learning_rate",
        ("It needs train_vision: true.", "需要 train_vision: true。"),
    ),
    _row(
        {"aligner_lr": "sw-train", "merger_lr": "2u1", "mm_projector_lr": "qwen"},
        "merger_learning_rate",
        ("It needs train_merger: true.", "需要 train_merger: true。"),
    ),
    _row(
        {"warmup_ratio": "hf-4"},
        "warmup_steps",
        ("Below 1 it is a part of all steps.", "小于 1 时表示占总步数的比例。"),
        _warmup,
    ),
    _row({"evaluation_strategy": "hf-4"}, "eval_strategy", translate=_evaluation),
    _row({"per_gpu_train_batch_size": "hf-4"}, "per_device_train_batch_size"),
    _row({"per_gpu_eval_batch_size": "hf-4"}, "per_device_eval_batch_size"),
    _row(
        {"overwrite_output_dir": "hf-4 lf-train"},
        "overwrite",
        ("It deletes an earlier run in output_dir.", "它会删除 output_dir 里原有的运行。"),
        _flag("overwrite"),
    ),
    _row({"no_cuda": "hf-4"}, "use_cpu", translate=_flag("use_cpu")),
    _row({"adafactor": "hf-4"}, "optim", translate=_if_true("optim", "adafactor")),
    _row({"push_to_hub_model_id": "hf-4"}, "hub_model_id"),
    _row({"torchdynamo": "hf-4"}, "torch_compile_backend"),
    _row(
        {"disable_gradient_checkpointing": "lf-model"},
        "activation_checkpointing",
        ("On where a GPU is used, unless set.", "使用 GPU 时缺省打开。"),
        _opposite("activation_checkpointing"),
    ),
    _row({"max_epochs": "sw-train"}, "num_train_epochs"),
    _absent(
        {
            "vit_gradient_checkpointing": "sw-train",
            "use_reentrant_gc": "lf-model",
            "use_unsloth_gc": "lf-model",
            "gradient_checkpointing_use_reentrant": "trl-scripts",
        },
        "activation_checkpointing holds for the whole model, and is never reentrant.",
        "activation_checkpointing 作用于整个模型，且不使用 reentrant。",
    ),
    _absent(
        {
            "enable_liger_kernel": "lf-model",
            "use_liger": "2u1 trl-0.16 sw-tuner-3.0",
            "use_unsloth": "lf-model",
        },
        *_LIGER,
    ),
    _absent(
        {
            "push_to_hub_token": "hf-4",
            "hf_hub_token": "lf-model",
            "ms_hub_token": "lf-model",
            "swanlab_api_key": "lf-tune",
            "swanlab_token": "sw-sft",
        },
        "Log in with `hf auth login`, or set HF_TOKEN; other services have variables of their own.",
        "请用 `hf auth login` 登录或设置 HF_TOKEN；其他服务用各自的环境变量。",
    ),
    _row({"use_swanlab": "lf-tune"}, "report_to", translate=_if_true("report_to", "swanlab")),
    _absent(
        {"logging_dir": "hf-4"},
        "Set the variable TENSORBOARD_LOGGING_DIR.",
        "请设置环境变量 TENSORBOARD_LOGGING_DIR。",
    ),
    _absent(
        {"plot_loss": "lf-tune"},
        "train_log.jsonl has the loss of every logging step; report_to sends it to a tracker.",
        "train_log.jsonl 记录每个日志步的损失；report_to 把它发给跟踪工具。",
    ),
    _absent(
        {"save_safetensors": "hf-4"},
        "Weights are always saved as safetensors.",
        "权重总是以 safetensors 保存。",
    ),
    _absent(
        {"add_version": "sw-sft", "create_checkpoint_symlink": "sw-sft"},
        "Files are written to output_dir as it is given.",
        "文件直接写到 output_dir。",
    ),
    _absent(
        {"resume_only_model": "sw-train", "load_args": "sw-base", "check_model": "sw-train"},
        "See resume_from_checkpoint and adapter_name_or_path.",
        "见 resume_from_checkpoint 和 adapter_name_or_path。",
    ),
    _absent(
        {"group_by_length": "hf-4"},
        "Packing fills every sequence to max_length.",
        "打包会把每个序列填到 max_length。",
    ),
    _absent(
        {"push_to_hub_organization": "hf-4"},
        "Write it into hub_model_id: owner/name.",
        "请写进 hub_model_id：owner/name。",
    ),
    _absent(
        {
            "sequence_parallel_size": "sw-template",
            "tp_size": "hf-4",
            "zero_hpz_partition_size": "sw-sft",
            "deepspeed_autotp_size": "sw-sft",
            "use_ray": "sw-docs",
        },
        "Only data is parallel: use deepspeed: zero2 or zero3.",
        "只支持数据并行：请用 deepspeed: zero2 或 zero3。",
    ),
    _absent(
        {"split_batches": "hf-4", "dispatch_batches": "hf-4"},
        "A batch is of each process.",
        "每个进程有自己的批。",
    ),
    _absent(
        {
            "optimizer": "sw-train",
            "loss_type": "sw-train trl",
            "metric": "sw-train",
            "external_plugins": "sw-base",
            "custom_register_path": "sw-base",
            "compute_accuracy": "lf-tune",
            "acc_strategy": "sw-train",
            "early_stopping_steps": "lf-tune",
            "activation_offloading": "trl",
            "use_dft_loss": "lf-tune",
            "enable_dft_loss": "sw-train",
        },
        "There is no such feature; optim names the optimizer, and the loss is that of targets.",
        "没有这个功能；optim 选择优化器，损失只算目标 token。",
    ),
    _absent(
        {
            "half_precision_backend": "hf-4",
            "fp16_backend": "hf-4",
            "fp16_opt_level": "hf-4",
            "use_ipex": "hf-4",
            "jit_mode_eval": "hf-4",
            "use_mps_device": "hf-4",
            "past_index": "hf-4",
            "ray_scope": "hf-4",
            "include_inputs_for_metrics": "hf-4",
            "include_tokens_per_second": "hf-4",
            "use_legacy_prediction_loop": "hf-4",
            "tpu_metrics_debug": "hf-4",
            "fsdp_min_num_params": "hf-4",
            "fsdp_transformer_layer_cls_to_wrap": "hf-4",
        },
        *_GONE,
    ),
)

LAUNCHERS = Synonym(
    {
        "local_rank": "hf-4",
        "_n_gpu": "hf-4",
        "n_gpu": "sw-sft",
        "tpu_num_cores": "hf-4",
        "mp_parameters": "hf-4",
        "rank": "sw-base",
        "world_size": "sw-base",
        "local_world_size": "sw-base",
        "global_world_size": "sw-base",
        "nproc_per_node": "torchrun",
        "nnodes": "torchrun",
        "node_rank": "torchrun",
        "master_addr": "torchrun",
        "master_port": "torchrun",
        "LOCAL_RANK": "torchrun",
        "RANK": "torchrun",
        "WORLD_SIZE": "torchrun",
        "LOCAL_WORLD_SIZE": "torchrun",
        "MASTER_ADDR": "torchrun sw-docs",
        "MASTER_PORT": "torchrun sw-docs",
        "NPROC_PER_NODE": "sw-docs",
        "NNODES": "sw-docs",
        "NODE_RANK": "sw-docs",
        "CUDA_VISIBLE_DEVICES": "sw-docs",
    },
    "",
    "The launcher sets it for each process (torchrun, deepspeed), or the shell before it.",
    "由启动器（torchrun、deepspeed）为每个进程设置，或在 shell 里设置。",
    _nothing,
)
"""What belongs to a process and not to a run: refused in a file, even where ``TrainingArguments`` has it."""

_WHOLE = "A source is read whole; share weighs it."
_WHOLE_ZH = "每个来源整体读取；用 share 调权重。"
SOURCE_FIELDS: tuple[Synonym, ...] = (
    _row(
        {
            "file_name": "lf-info",
            "hf_hub_url": "lf-info",
            "annotation_path": "qwen-data",
            "hf_dataset_id": "sw-info",
            "dataset_path": "sw-info",
        },
        "path",
        ("", ""),
        _same("path"),
    ),
    _row({"data_path": "qwen-data"}, "media_root", _ROOT, _same("media_root")),
    _row({"dataset_name": "sw-info"}, "name", ("", ""), _same("name")),
    _row(
        {"formatting": "lf-info"},
        "format",
        ("auto looks at the rows.", "auto 会查看前几行数据。"),
        _chosen("format", {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}),
    ),
    _absent({"num_samples": "lf-info", "sampling_rate": "qwen-data"}, _WHOLE, _WHOLE_ZH),
    _absent(
        {"columns": "lf-info", "tags": "lf-info", "preprocess_func": "sw-info"},
        "Fields have the names of their format: rename them in the data.",
        "字段名由格式规定：请在数据里改名。",
    ),
    _absent(
        {
            "subset": "lf-info",
            "subsets": "sw-info",
            "folder": "lf-info",
            "revision": "lf-info",
            "ms_hub_url": "lf-info",
            "ms_dataset_id": "sw-info",
            "script_url": "lf-info",
        },
        "Download it and give its folder as path.",
        "请先下载，再把目录写作 path。",
    ),
    _absent({"ranking": "lf-info"}, "There is no preference training.", "没有偏好训练。"),
)
"""What other tools call the fields of one source."""

SOURCE_BY_NAME: Mapping[str, Synonym] = {name: row for row in SOURCE_FIELDS for name in row.names}

VALUES: Mapping[tuple[str, str], str] = {
    ("optim", "adamw_hf"): "adamw_torch",
    ("optim", "adamw_apex_fused"): "adamw_torch_fused",
    ("dtype", "bf16"): "bfloat16",
    ("dtype", "fp16"): "float16",
    ("dtype", "fp32"): "float32",
    ("dtype", "half"): "float16",
    ("dtype", "float"): "float32",
    ("attn_implementation", "flash_attn"): "flash_attention_2",
    ("attn_implementation", "flash_attention"): "flash_attention_2",
    ("attn_implementation", "fa2"): "flash_attention_2",
    ("attn_implementation", "fa3"): "flash_attention_3",
}
"""Values that a key of ours has elsewhere, or had, and what they are here."""

BY_NAME: Mapping[str, Synonym] = {name: row for row in (*SYNONYMS, LAUNCHERS) for name in row.names}

FAMILIES: Mapping[str, str] = {
    "swanlab_": "report_to: swanlab reads its settings from variables",
    "galore_": "see optim for the optimizers",
    "use_galore": "see optim for the optimizers",
    "apollo_": "see optim for the optimizers",
    "use_apollo": "see optim for the optimizers",
    "badam_": "see optim for the optimizers",
    "use_badam": "see optim for the optimizers",
    "use_adam_mini": "see optim for the optimizers",
    "use_muon": "see optim for the optimizers",
    "oft_": "there is full, lora and qlora",
    "pissa_": "there is full, lora and qlora",
    "adalora_": "there is full, lora and qlora",
    "vera_": "there is full, lora and qlora",
    "boft_": "there is full, lora and qlora",
    "reft_": "there is full, lora and qlora",
    "lisa_": "there is full, lora and qlora",
    "lora_ga_": "there is full, lora and qlora",
    "llamapro_": "there is full, lora and qlora",
    "use_llama_pro": "there is full, lora and qlora",
    "fourier_": "there is full, lora and qlora",
    "dpo_": "there is no preference training",
    "kto_": "there is no preference training",
    "ppo_": "there is no preference training",
    "pref_": "there is no preference training",
    "simpo_": "there is no preference training",
    "ref_model": "there is no preference training",
    "reward_model": "there is no preference training",
    "vllm_": "nothing is generated",
    "ray_": "use torchrun or deepspeed",
}
"""Beginnings of names of methods that vlcpt does not have, all read in the files above, and what there is."""


def tools(name: str, rows: Mapping[str, Synonym] = BY_NAME) -> str:
    """The tools that have a name, for a message.

    Example:
        >>> tools("lora_rank")
        'LLaMA-Factory, ms-swift, 2U1'
    """
    codes = rows[name].names[name].split()
    return ", ".join(dict.fromkeys(SOURCES[code].tool for code in codes))
