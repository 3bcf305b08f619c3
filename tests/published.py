"""A tiny random base in the layout in which Qwen publishes Qwen2.5-VL, which is what users load.

    python -m tests.published FOLDER

The configuration is flat, as transformers 4.41 wrote it; the weights are sharded, in bfloat16 and under their
old names; the processor is described by preprocessor_config.json, and generation may end at two tokens.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from tests.data.real_tokenizer import ADDED, SPECIAL, load_real_tokenizer

Vocabulary = Literal["small", "real"]
DEMO_TOKENIZER = Path(__file__).parents[1] / "vlcpt" / "demo" / "base" / "tokenizer.json"
# Names of layouts: the vocabulary, and whether the embeddings are tied.
PUBLISHED: dict[str, tuple[Vocabulary, bool]] = {
    "3B": ("small", True),
    "7B": ("small", False),
    "3B, real vocabulary": ("real", True),
}
REAL = "3B, real vocabulary"
# For tests that run on each layout of a model. The published two differ in one key and one tensor, so one is
# enough with the real vocabulary.
LAYOUTS = ["saved", "3B", "7B", pytest.param(REAL, marks=pytest.mark.slow)]
# For tests of the processor alone, which is the same in the 3B and the 7B.
PROCESSOR_LAYOUTS = ["saved", "3B", pytest.param(REAL, marks=pytest.mark.slow)]
# The published 3B and 7B have more rows of embeddings than tokens.
ROWS = {"small": 1040, "real": 151_936}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_published(
    folder: Path, *, vocabulary: Vocabulary = "small", tied: bool = True, hidden: int = 64, seed: int = 0
) -> Path:
    """Write a base as it is published: the 3B's layout if ``tied``, else that of the 7B.

    Args:
        folder: To make; whatever is there is deleted.
        vocabulary: ``small`` has the demo's thousand tokens, ``real`` Qwen's 151,665, whose output layer
            makes a step ten times slower. Both end in all of Qwen's control tokens, in Qwen's order.
        hidden: Of the language tower; a multiple of 64.

    Returns:
        ``folder``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    first_special = _write_tokenizer(folder, vocabulary)
    ids = {token: first_special + place for place, token in enumerate((*SPECIAL, *ADDED))}
    _write_json(folder / "config.json", _config(ids, ROWS[vocabulary], tied, hidden))
    _write_weights(folder, tied, seed)
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "repetition_penalty": 1.05,
            "temperature": 0.000001,
            "transformers_version": "4.49.0",
        },
    )
    _write_json(
        folder / "preprocessor_config.json",
        {
            "min_pixels": 3136,
            "max_pixels": 12845056,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
        },
    )
    _write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    (folder / "LICENSE").write_text("A stand-in for the licence file of a published base.\n")
    return folder


def spread_weights(model: torch.nn.Module) -> None:
    """Random weights of a size at which inputs that differ give logits that differ.

    The usual 0.02 leaves all logits of a tiny model near zero: the wrong ones would agree with the right.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 1.0 if "embed" in name else 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)


def _config(ids: dict[str, int], rows: int, tied: bool, hidden: int) -> dict[str, object]:
    half = hidden // 4 // 2  # of a head's dimensions: time, height and width share them
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 128000,
        "max_window_layers": 70,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [half - 2 * (half * 3 // 8), *[half * 3 // 8] * 2],
        },
        "vocab_size": rows,
    }


def _write_weights(folder: Path, tied: bool, seed: int) -> None:
    """Two files of bfloat16 tensors under the names that transformers used before 4.52."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    spread_weights(model)
    weights = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value.bfloat16()
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    names = sorted(weights)
    parts = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    for file, part in parts.items():
        content = {name: weights[name].contiguous() for name in part}
        save_file(content, folder / file, metadata={"format": "pt"})
    _write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": sum(value.numel() * 2 for value in weights.values())},
            "weight_map": {name: file for file, part in parts.items() for name in part},
        },
    )


def _write_tokenizer(folder: Path, vocabulary: Vocabulary) -> int:
    """The tokenizer's files; gives the id of the first control token."""
    real = vocabulary == "real"
    text = load_real_tokenizer().backend_tokenizer.to_str() if real else DEMO_TOKENIZER.read_text("utf-8")
    content = json.loads(text)
    tokens, merges = content["model"]["vocab"], content["model"]["merges"]
    content["model"]["merges"] = [" ".join(pair) for pair in merges]
    described = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert described == {token: len(tokens) + place for place, token in enumerate((*SPECIAL, *ADDED))}
    _write_json(folder / "tokenizer.json", content)
    _write_json(folder / "vocab.json", tokens)
    (folder / "merges.txt").write_text("\n".join(content["model"]["merges"]) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(number): {"content": token, **flags, "special": token in SPECIAL}
                for token, number in described.items()
            },
            "additional_special_tokens": SPECIAL[1:],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    return len(tokens)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    print(write_published(Path(sys.argv[1])))
