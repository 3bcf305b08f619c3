"""The demo's processor: Qwen2.5-VL's own text and media rules, with a vocabulary of 1,024 entries.

A tiny model spends most of its time on a full-size output layer, so the vocabulary is trained
anew; the pre-tokenizer, the normaliser and the order of the control tokens are the model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2_5_VLProcessor, Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

VOCABULARY_SIZE = 1024
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip


def build_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """Train a byte-level BPE tokenizer: all 256 bytes, merges of ``texts``, then the control tokens.

    Raises:
        ValueError: If ``texts`` are too few to fill the vocabulary.
    """
    # An empty Qwen2Tokenizer brings the regular expression and the NFC normaliser.
    pipeline = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    merges_until = VOCABULARY_SIZE - len(SPECIAL_TOKENS) - len(ADDED_TOKENS)
    trainer = BpeTrainer(
        vocab_size=merges_until,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    vocabulary = pipeline.get_vocab(with_added_tokens=False)
    vocabulary = {token: number for token, number in vocabulary.items() if token not in SPECIAL_TOKENS}
    if sorted(vocabulary.values()) != list(range(merges_until)):
        raise ValueError(
            f"The texts give {len(vocabulary)} tokens of {merges_until}: add text to general.txt."
        )
    return _with_control_tokens(vocabulary, _merges_of(pipeline))


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLProcessor:
    """Put the tokenizer beside Qwen2.5-VL's media processors, with limits that suit small pictures."""
    pixels = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 256}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(pixels)),
        video_processor=Qwen2VLVideoProcessor(size=dict(pixels), cap_pixels_per_frame=True),
        tokenizer=tokenizer,
    )


def _with_control_tokens(vocabulary: dict[str, int], merges: list[Any]) -> Qwen2Tokenizer:
    """A tokenizer whose control tokens follow the vocabulary in the model's order."""
    control = {
        token: len(vocabulary) + number for number, token in enumerate((*SPECIAL_TOKENS, *ADDED_TOKENS))
    }
    # Given to the constructor, the special tokens would be added first, in another order.
    settings: dict[str, Any] = {"unk_token": None, "eos_token": None, "pad_token": None}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=131072, **settings)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in control}
    if found != control:
        raise ValueError(f"Control tokens have the wrong ids: {found}, not {control}.")
    return tokenizer


def _merges_of(pipeline: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a trained tokenizer, which its Python object shows only through its JSON."""
    return [tuple(pair) for pair in json.loads(pipeline.to_str())["model"]["merges"]]
