"""Spans to targets: each rule by example, and equal to a slow and plain reading of the contract."""

import json
import random
import time
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.data.real_tokenizer import byte_characters
from tests.data.strategies import CONTROL, PIECES, texts
from vlcpt import DocumentError, Text
from vlcpt.data.encode.tokens import Run, RunTokenizer

BYTES = {letter: byte for byte, letter in byte_characters().items()}
shared = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session", params=["tiny", "real"])
def tokenizer(request, tiny_processor):
    """Each of the two vocabularies."""
    return tiny_processor.tokenizer if request.param == "tiny" else request.getfixturevalue("real_tokenizer")


@pytest.fixture(scope="session")
def tiny_runs(tiny_processor):
    return RunTokenizer(tiny_processor.tokenizer)


@pytest.fixture(scope="session")
def real_runs(real_tokenizer):
    return RunTokenizer(real_tokenizer)


def run(tokenizer: object) -> RunTokenizer:
    """One run tokenizer for each tokenizer: making the real one takes two seconds."""
    if not hasattr(tokenizer, "vlcpt_runs"):
        tokenizer.vlcpt_runs = RunTokenizer(tokenizer)
    return tokenizer.vlcpt_runs


def parts(marked: str) -> list[Text]:
    """``a[b]c`` as texts, [b] trained; ``{b}`` is trained with weight 2."""
    found, text, weight = [], "", 0.0
    for letter in marked + "\0":
        if letter in "[]{}\0":
            found += [Text(text, weight > 0, weight or 1.0)] if text else []
            text, weight = "", {"[": 1.0, "{": 2.0}.get(letter, 0.0)
        else:
            text += letter
    return found


def shown(tokenizer: object, texts: list[Text]) -> list[tuple[str, float]]:
    """Each token's text with its weight."""
    found = run(tokenizer).tokenize(texts)
    return [
        (tokenizer.decode([token]), weight)
        for token, weight in zip(found.ids.tolist(), found.weights.tolist(), strict=True)
    ]


# ---- the rules of the contract, "Targets" 2, with the model's own vocabulary


@pytest.mark.parametrize(
    ("marked", "tokens", "cuts"),
    [
        # No edge inside a token.
        ("The[ capital]", [("The", 0), (" capital", 1)], 0),
        # The part outside is white space: the token stays whole, and is a target.
        ("in [Paris]", [("in", 0), (" Paris", 1)], 0),
        ("a\n[\n]b", [("a", 0), ("\n\n", 1), ("b", 0)], 0),
        ("[def f():\n ]   x", [("def", 1), (" f", 1), ("():\n", 1), ("   ", 1), (" x", 0)], 0),
        # The part outside holds more: the text is cut there.
        ("in[ Pa]ris", [("in", 0), (" Pa", 1), ("ris", 0)], 1),
        ("capit[al]", [("cap", 0), ("it", 0), ("al", 1)], 1),
        ("[ capit]al", [(" capit", 1), ("al", 0)], 1),
        # A span inside a token is cut on both sides, left first.
        ("c[apit]al", [("c", 0), ("ap", 1), ("it", 1), ("al", 0)], 2),
        # White space inside the span, the word outside.
        ("in[ ]Paris", [("in", 0), (" ", 1), ("Paris", 0)], 1),
        # White space and more outside.
        ("in Pa[ris]", [("in", 0), (" Pa", 0), ("ris", 1)], 1),
        # A token over two spans: the weight of its first character that is not white space.
        ("in[ ]{Paris}", [("in", 0), (" Paris", 2)], 0),
        ("in[ Pa]{ris}", [("in", 0), (" Paris", 1)], 0),
        ("in [P]{aris}", [("in", 0), (" Paris", 1)], 0),
        ("in{ Pa}[ri]s", [("in", 0), (" P", 2), ("ari", 2), ("s", 0)], 1),
        # White space alone: of its first character inside.
        ("a\n{\n}[\n]b", [("a", 0), ("\n\n\n", 2), ("b", 0)], 0),
        # Chinese: a token may be a phrase.
        ("[中国]人民", [("中国", 1), ("人民", 0)], 1),
        ("中[国]人", [("中", 0), ("国", 1), ("人", 0)], 2),
    ],
)
def test_a_spans_edge_keeps_or_cuts_a_token(real_tokenizer, marked, tokens, cuts):
    assert shown(real_tokenizer, parts(marked)) == tokens
    assert run(real_tokenizer).tokenize(parts(marked)).cut_edges == cuts


def test_the_words_of_the_examples_are_single_tokens(real_tokenizer):
    for word in (" Paris", " capital", "\n\n", "\n\n\n", "中国人民"):
        assert len(real_tokenizer.encode(word)) == 1  # or the examples above prove nothing


def test_a_whole_run_is_tokenised_as_at_inference(tokenizer):
    text = "It's  12,5 Straße\n\n\tnaïve 中文。 e\u0301 \u1100\u1161 😀🧑‍🔬 <b>x</b>"
    for texts_of_run in ([Text(text, True)], [Text(text[:8]), Text(text[8:], True)]):
        assert run(tokenizer).tokenize(texts_of_run).ids.tolist() == tokenizer.encode(text)


# ---- Unicode


def test_an_emoji_of_several_tokens_is_trained_whole(tokenizer):
    found = shown(tokenizer, parts("a[🧑‍🔬]b"))
    assert len(found) > 4
    assert [weight for _, weight in found] == [0.0] + [1.0] * (len(found) - 2) + [0.0]


@pytest.mark.parametrize(
    ("marked", "trained"),
    [
        ("e[\u0301x]", "\u0301x"),  # would be é
        ("[e]\u0301x", "e"),
        ("a[\u0301\u0323b]", "\u0323\u0301b"),  # would be ạ and an accent, in another order
        ("\u1100[\u1161]\u11a8", "\u1161"),  # would be one syllable
        ("[\u1100\u1161]\u11a8", "가"),
        ("k[e\u0301]k", "é"),  # inside the span it is
        ("x[\u0958]y", "\u0915\u093c"),  # one character that becomes two
    ],
)
def test_an_edge_between_characters_that_would_compose_cuts_them(tokenizer, marked, trained):
    texts_of_run = parts(marked)
    found = run(tokenizer).tokenize(texts_of_run)
    assert tokenizer.decode(found.ids[found.weights > 0]) == trained
    assert found.cut_edges >= (
        unicodedata.normalize("NFC", "".join(t.text for t in texts_of_run))
        != "".join(unicodedata.normalize("NFC", t.text) for t in texts_of_run)
    )


def test_a_character_composed_over_two_spans_takes_the_weight_of_the_first(tokenizer):
    found = run(tokenizer).tokenize(parts("x[e]{\u0301 y}"))
    weights = dict(
        zip(map(tokenizer.decode, found.ids[:, None].tolist()), found.weights.tolist(), strict=True)
    )
    assert tokenizer.decode(found.ids) == "xé y"
    assert weights[" y"] == 2.0 if " y" in weights else weights["y"] == 2.0
    assert found.weights.tolist()[1] == 1.0
    assert found.cut_edges == 0


# ---- control tokens


def test_no_control_token_comes_from_text(tokenizer):
    controls = set(tokenizer.get_added_vocab().values())
    assert len(controls) == 22  # special, and merely added
    for control in tokenizer.get_added_vocab():
        for text in (control, f"a{control}b", f" {control}\n", control * 2, control[:4] + control):
            for texts_of_run in ([Text(text, True)], [Text(text[:3]), Text(text[3:], True)]):
                found = run(tokenizer).tokenize(texts_of_run)
                assert not controls & set(found.ids.tolist())
                assert tokenizer.decode(found.ids) == text


@settings(shared, max_examples=150)
@given(
    st.lists(st.sampled_from([*CONTROL, "<|", "|>", "image_pad", "<tool_call", ">", "<", "a"]), max_size=8)
)
def test_no_control_token_comes_from_fragments_put_together(tiny_processor, pieces):
    text = "".join(pieces) or "a"
    controls = set(tiny_processor.tokenizer.get_added_vocab().values())
    half = len(text) // 2
    texts_of_run = [Text(text[:half]), Text(text[half:], True)] if half else [Text(text)]
    assert not controls & set(run(tiny_processor.tokenizer).tokenize(texts_of_run).ids.tolist())


# ---- equal to a plain reading of the contract, character by character


class Naive:
    """The contract read literally: look at the leftmost edge inside a token, cut, begin again.

    Characters of a token are found by decoding its bytes, not by the tokenizer's offsets.
    """

    def __init__(self, tokenizer: object) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["added_tokens"] = []
        self.tokenizer = Tokenizer.from_str(json.dumps(state))

    def tokenize(self, texts_of_run: list[Text]) -> tuple[list[int], list[float]]:
        weighted = [(letter, t.weight if t.trainable else 0.0) for t in texts_of_run for letter in t.text]
        return self._piece(weighted)

    def _piece(self, letters: list[tuple[str, float]]) -> tuple[list[int], list[float]]:
        text = "".join(letter for letter, _ in letters)
        nfc = unicodedata.normalize("NFC", text)
        edges = [n for n in range(1, len(letters)) if (letters[n - 1][1] > 0) != (letters[n][1] > 0)]
        for edge in edges:
            if unicodedata.normalize("NFC", text[:edge]) + unicodedata.normalize("NFC", text[edge:]) != nfc:
                return self._cut(letters, edge)
        weights: list[float] = []  # of the normalised characters
        places = []  # edges, in normalised characters
        for number, (_, weight) in enumerate(letters):
            reached = len(unicodedata.normalize("NFC", text[: number + 1]))
            if number in edges:
                places.append((len(weights), number))
            weights += [weight] * (reached - len(weights))
        encoding = self.tokenizer.encode(nfc)
        of_byte = [number for number, letter in enumerate(nfc) for _ in letter.encode()]
        ranges, done = [], 0
        for token in encoding.tokens:
            size = len([BYTES[letter] for letter in token])
            ranges.append((of_byte[done], of_byte[done + size - 1] + 1))
            done += size
        assert done == len(of_byte)
        for place, edge in places:
            for first, last in ranges:
                if first < place < last:
                    step = 1 if weights[place] == 0 else -1
                    outside, at = "", place if step == 1 else place - 1
                    while first <= at < last and weights[at] == 0:
                        outside, at = outside + nfc[at], at + step
                    if not outside.isspace():
                        return self._cut(letters, edge)
        found = []
        for first, last in ranges:
            inside = [n for n in range(first, last) if weights[n] > 0]
            solid = [n for n in inside if not nfc[n].isspace()]
            found.append(weights[(solid or inside)[0]] if inside else 0.0)
        return encoding.ids, found

    def _cut(self, letters: list[tuple[str, float]], edge: int) -> tuple[list[int], list[float]]:
        left, right = self._piece(letters[:edge]), self._piece(letters[edge:])
        return left[0] + right[0], left[1] + right[1]


@pytest.fixture(scope="session")
def naive(tiny_processor):
    return Naive(tiny_processor.tokenizer)


runs_of_texts = st.lists(
    st.builds(Text, texts, st.booleans(), st.sampled_from([1.0, 0.5, 1e-9, 100.0])), min_size=1, max_size=8
)


def alike(runs: RunTokenizer, naive: Naive, texts_of_run: list[Text]) -> None:
    found = runs.tokenize(texts_of_run)
    ids, weights = naive.tokenize(texts_of_run)
    assert found.ids.tolist() == ids
    assert found.weights.tolist() == np.float32(weights).tolist()


@settings(shared, max_examples=400)
@given(runs_of_texts)
def test_tokens_and_weights_equal_a_plain_reading_of_the_contract(tiny_runs, naive, texts_of_run):
    alike(tiny_runs, naive, texts_of_run)


@settings(shared, max_examples=150)
@given(st.text(alphabet="ab é'st1 \n\t!.-中", min_size=2, max_size=40), st.data())
def test_many_edges_in_words_and_white_space_equal_the_plain_reading(tiny_runs, naive, text, data):
    edges = sorted(data.draw(st.sets(st.integers(1, len(text) - 1), max_size=12)))
    bounds = [0, *edges, len(text)]
    alike(
        tiny_runs,
        naive,
        [Text(text[a:b], n % 2 == 0) for n, (a, b) in enumerate(pairwise(bounds))],
    )


class LongWay(RunTokenizer):
    """Looks at every character, also where no edge cuts a token."""

    def __init__(self, runs: RunTokenizer) -> None:
        self.__dict__ |= vars(runs)

    def tokenize(self, texts: list[Text]) -> Run:
        return self._cut(texts)


@settings(shared, max_examples=300)
@given(runs_of_texts, st.booleans(), st.booleans())
def test_the_short_way_gives_what_the_long_one_gives(tiny_runs, real_runs, texts_of_run, is_real, is_fast):
    runs = real_runs if is_real else tiny_runs
    expected = LongWay(runs).tokenize(texts_of_run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_is_fast", is_fast)
        found = runs.tokenize(texts_of_run)
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.weights.tolist() == expected.weights.tolist()
    assert found.cut_edges == expected.cut_edges


@pytest.mark.parametrize(
    "marked",
    ["The[ capital] of", "in [Paris]", "a\n[\n]b", "in[ ]{Paris}", "in[ Pa]{ris}", "[a]{ b}", "{a }[b]"],
)
def test_the_short_way_is_taken_where_no_edge_cuts_a_token(real_tokenizer, marked, monkeypatch):
    expected = LongWay(run(real_tokenizer)).tokenize(parts(marked))
    monkeypatch.setattr(RunTokenizer, "_cut", lambda self, texts: pytest.fail("the long way"))
    short = run(real_tokenizer).tokenize(parts(marked))
    assert (short.ids.tolist(), short.weights.tolist()) == (expected.ids.tolist(), expected.weights.tolist())


@pytest.mark.parametrize("seed", range(6))
def test_tokenising_only_around_a_cut_equals_tokenising_everything_again(real_tokenizer, seed):
    """Long texts of words, code, Chinese and digits, where a cut may change tokens on both sides."""
    rng = random.Random(seed)
    words = [
        " the",
        " capital",
        "Paris",
        "'s",
        "it's",
        "12",
        " 3",
        ".",
        ",\n",
        "\n\n",
        "   ",
        "中国",
        "人民。",
        "()",
        "x",
    ]
    words += [piece for piece in PIECES if not any(map(unicodedata.combining, piece))]
    text = unicodedata.normalize("NFC", "".join(rng.choices(words, k=300)))
    edges = sorted(rng.sample(range(1, len(text)), 60))
    bounds = [0, *edges, len(text)]
    texts_of_run = [Text(text[a:b], n % 2 == 0) for n, (a, b) in enumerate(pairwise(bounds))]
    if not hasattr(real_tokenizer, "vlcpt_naive"):
        real_tokenizer.vlcpt_naive = Naive(real_tokenizer)

    assert run(real_tokenizer).tokenize(texts_of_run).cut_edges > 5
    alike(run(real_tokenizer), real_tokenizer.vlcpt_naive, texts_of_run)


@pytest.mark.parametrize("language", ["english", "chinese", "hexadecimal"])
def test_two_thousand_cuts_in_200_kilobytes_take_seconds(tiny_runs, language):
    """Tokenising the rest again after each cut took minutes."""
    rng = random.Random(0)
    letters = {
        "english": "abcdefgh  \n,.",
        "chinese": "的一是在不了有和人这中大为上个国我，。",
        "hexadecimal": "0123456789abcdef",
    }
    text = "".join(rng.choices(letters[language], k=200_000 if language != "chinese" else 67_000))
    edges = sorted(rng.sample(range(1, len(text)), 4_000))
    bounds = [0, *edges, len(text)]
    texts_of_run = [Text(text[a:b], n % 2 == 1) for n, (a, b) in enumerate(pairwise(bounds))]

    before = time.process_time()
    found = tiny_runs.tokenize(texts_of_run)
    assert time.process_time() - before < 5
    trained = sum(len(t.text) for t in texts_of_run if t.trainable)
    assert 0 < (found.weights > 0).sum() <= trained * (3 if language == "chinese" else 1)
    if language != "chinese":  # there, each character is three tokens of one byte, and none holds an edge
        assert found.cut_edges > 50


@pytest.mark.parametrize("letters", ["closes", "pumpvalve"])
def test_a_word_of_20_thousand_letters_that_spans_cut_everywhere_is_refused_in_seconds(tiny_runs, letters):
    """Each cut tokenises the rest of the word again: it took minutes."""
    word = (letters * 20_000)[:20_000]
    before = time.process_time()
    with pytest.raises(
        DocumentError, match=r"cut a word of [\d,]+ characters, after [\d,]+ other cuts\. Put the"
    ):
        tiny_runs.tokenize([Text(letter, n % 2 == 1) for n, letter in enumerate(word)])
    assert time.process_time() - before < 15


def test_a_small_weight_beside_a_large_one_is_not_lost(tiny_runs):
    texts_of_run = [Text("a " * 50_000, True, 100.0), Text(" b", True, 1e-12), Text(" c")]
    assert tiny_runs.tokenize(texts_of_run).weights[-2:].tolist() == [np.float32(1e-12), 0.0]


def test_ids_and_weights_are_arrays_of_one_length(tiny_runs):
    for texts_of_run in ([Text("a b")], parts("a[ b]")):
        found = tiny_runs.tokenize(texts_of_run)
        assert found.ids.dtype == np.int64
        assert len(found.ids) == len(found.weights)
