"""Which tokens end at, or go over, the edge of a span; the whole against the long way is in test_tokens."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from vlcpt import Text
from vlcpt.data.encode.tokens import byte_sizes, part_ends


def test_the_bytes_of_a_texts_tokens_are_the_bytes_of_the_text(tiny_processor, real_tokenizer):
    for tokenizer in (tiny_processor.tokenizer, real_tokenizer):
        backend = tokenizer.backend_tokenizer
        sizes = byte_sizes(json.loads(backend.to_str()))
        for text in ("a pump closes", "阀门 é 👍🏽", "\n\n   x = 1\t"):
            ids = backend.encode(text).ids
            assert sum(sizes[token] for token in ids) == len(text.encode())


def test_tokens_of_characters_have_no_bytes():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert byte_sizes(json.loads(tokenizer.to_str())) == []
    tokenizer.pre_tokenizer = None
    assert byte_sizes(json.loads(tokenizer.to_str())) == []
    tokenizer = Tokenizer(models.Unigram([("a", 0.0)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    assert byte_sizes(json.loads(tokenizer.to_str())) == []
    assert part_ends([Text("a"), Text("a", trainable=True)], [0, 0], []) is None


@pytest.mark.parametrize(
    ("texts", "sizes", "ends"),
    [
        # Between tokens.
        ([Text("ab"), Text("c", True)], [2, 1], [1, 2]),
        ([Text("阀"), Text("门", True)], [1, 2, 3], [2, 3]),
        # Over the edge: white space outside stays with the span, more is cut.
        ([Text("a "), Text("b", True)], [1, 2], [1, 2]),
        ([Text("a\u3000"), Text("b", True)], [1, 4], [1, 2]),
        ([Text("a", True), Text(" b")], [2, 1], [1, 2]),
        ([Text("a "), Text("b", True)], [3], None),
        ([Text("a", True), Text("b")], [2], None),
        # Between two spans: to the first, unless only white space of it is in there.
        ([Text("a", True), Text("b", True, 2.0)], [2], [1, 1]),
        ([Text("a ", True), Text("b", True, 2.0)], [1, 2], [1, 2]),
        ([Text("a ", True), Text(" b", True, 2.0)], [1, 2, 1], [2, 3]),
        # More than one edge, and halves of characters, need a closer look.
        ([Text("a "), Text(" ", True), Text(" b")], [1, 3, 1], None),
        ([Text("门"), Text("b", True)], [1, 3], None),
        ([Text("b", True), Text("门")], [2, 2], None),
        # Not the text's bytes.
        ([Text("ab"), Text("c", True)], [2, 2], None),
    ],
)
def test_a_text_ends_after_the_tokens_that_are_its_own(texts, sizes, ends):
    assert part_ends(texts, range(len(sizes)), sizes) == ends
