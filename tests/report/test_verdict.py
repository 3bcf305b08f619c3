"""Tests of vlcpt/report/verdict.py: what is said of which numbers."""

import math
import shlex
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from vlcpt.report.verdict import CommandPaths, verdict, verdict_of_run


def numbers(loss=1.0, base=None, shuffled=None, blank=None, width=0.05):
    """A set of many documents, each interval ``width`` wide on both sides."""
    others = {"learnt": base, "shuffled": shuffled, "blank": blank}
    intervals = {"loss": [loss - width, loss + width]}
    intervals |= {
        name: None if other is None else [other - loss - width, other - loss + width]
        for name, other in others.items()
    }
    keys = {"base_loss": base, "shuffled_images_loss": shuffled, "blank_images_loss": blank}
    return {"loss": loss, "intervals": intervals, **keys}


def said(results, retention=()):
    """The sentences, by what they are about."""
    found = {}
    for one in verdict(results, retention).sentences:
        found.setdefault(one.kind, []).append(one.text)
    return found


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (1.5, "held: learnt. The loss is 1.000, 0.500 less than before (95% interval 0.450 to 0.550)"),
        (0.5, "held: worse than before. The loss is 1.000, 0.500 more (95% interval 0.450 to 0.550)"),
        (
            1.02,
            "held: nothing clearly learnt. The loss is 1.000, 0.020 less than before",
        ),
        (None, "held: loss 1.000, perplexity 2.72; there is no base to compare with."),
    ],
)
def test_what_was_learnt_is_said_with_its_interval(base, words):
    (sentence,) = said({"held": numbers(base=base)})["learnt"]

    assert sentence.startswith(words)


def test_perplexity_is_said_before_and_after():
    (sentence,) = said({"held": numbers(loss=1.0, base=2.0)})["learnt"]

    assert sentence.endswith("; perplexity 7.39 → 2.72.")


def test_a_model_that_is_its_base_gives_exactly_the_same():
    same = numbers(base=1.0, width=0.0)

    found = said({"held": same, "old": same}, ["old"])

    assert found["learnt"] == ["held: exactly what the base gives, loss 1.000."]
    assert found["kept"] == ["old: exactly what the base gives, loss 1.000."]


@pytest.mark.parametrize(
    ("shuffled", "blank", "words"),
    [
        (2.0, 3.0, "held: read from its images: another document's image costs 1.000"),
        (1.0, 1.0, "held: your text does not need its images:"),
        (1.04, 1.04, "held: your text does not need its images:"),  # intervals reach 0
        (1.0, 2.0, "held: your text needs some image, but not its own:"),
        (None, 2.0, "held: read from its images: a blank image costs 1.000"),
    ],
)
def test_images_are_needed_where_the_interval_is_clear_of_nothing(shuffled, blank, words):
    (sentence,) = said({"held": numbers(shuffled=shuffled, blank=blank)})["images"]

    assert sentence.startswith(words)


def test_a_set_without_images_says_nothing_of_them():
    assert "images" not in said({"held": numbers(base=2.0)})


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (0.999, "old: kept. The loss is 1.000, a change of 0.001"),
        (1.4, "old: better than before."),
        (0.96, "old: a little forgotten. The loss is 1.000, 0.040 more than before"),
        (0.5, "old: forgotten. The loss is 1.000, 0.500 more than before"),
    ],
)
def test_what_was_kept_is_said_in_nats_and_percent(base, words):
    (sentence,) = said({"old": numbers(base=base, width=0.02)}, ["old"])["kept"]

    assert sentence.startswith(words)
    assert sentence.endswith("%.")


def test_a_run_is_judged_by_its_evaluations_before_step_1_and_at_its_end():
    log = [
        *({"step": 0, "eval_new_loss": 6.0}, {"step": 0, "eval_old_loss": 1.0}),
        *({"step": 5, "eval_new_loss": 4.0}, {"step": 9, "loss": 2.5}),
        *({"step": 9, "eval_new_loss": 2.0}, {"step": 9, "eval_old_loss": 1.5}),
    ]

    learnt, kept, *_ = verdict_of_run(log, ["old"]).sentences

    assert learnt.text.startswith("new: the loss fell by 4.000 to 2.000 (no interval was measured);")
    assert kept.text.startswith("old: the loss rose by 0.500 to 1.500 (no interval was measured);")
    assert learnt.is_good is kept.is_good is None
    assert verdict_of_run(log[3:]) is None  # nobody measured before step 1


def test_what_blank_images_cost_is_said_of_held_out_documents_as_the_log_has_it():
    log = [
        {"step": step, f"eval_{name}_loss": loss, f"eval_{name}_reliance": relies}
        | {f"eval_{name}_blank_images_loss": loss + relies}
        for step, loss, relies in ((0, 6.0, 0.25), (9, 2.0, 1.5))
        for name in ("new", "old")
    ]

    found = [one.text for one in verdict_of_run(log, ["old"]).sentences if one.kind == "images"]

    words = "a blank image costs 1.500 nats a target, and 0.250 before training (no interval was measured)."
    assert found == [f"new: {words}"]


# What another document's image costs, and what a blank one: nats with their interval.
PLACES = {
    **{"above": (0.5, [0.45, 0.55]), "within": (0.0, [-0.05, 0.05]), "below": (-0.5, [-0.55, -0.45])},
    **{"wide": (0.3, [-0.4, 1.0]), "few": (0.3, None)},
}
SHORT = {"above": "above", "within": "within", "below": "below", "wide": "too few", "few": "too few"}
NEEDLESS = ["--reliance CHECKPOINT"]
ANY = ["another document's image serves as well"]
PAIRS = ["look at pairs of image and text"]
HARM = ["look at pairs of image and text", "its images make it worse"]
MORE = ["too few documents to be sure"]
IMAGES = {
    ("above", "above"): ("read from its images:", True, []),
    ("above", "within"): (
        "without one it does as well: your text does not need its images:",
        False,
        NEEDLESS,
    ),
    ("above", "below"): ("without one it does better: its images make it worse:", False, HARM),
    ("above", "too few"): ("another image misleads it; too few documents to say whether", None, MORE),
    ("above", None): ("read from its images:", True, []),
    ("within", "above"): ("your text needs some image, but not its own:", False, ANY),
    ("within", "within"): (": your text does not need its images:", False, NEEDLESS),
    ("within", "below"): ("does better without its images: they make it worse:", False, HARM),
    ("within", "too few"): ("image serves as well; too few documents to say", False, NEEDLESS + MORE),
    ("within", None): (": another document's image serves as well:", False, NEEDLESS),
    ("below", "above"): ("does better with another document's than with its own:", False, PAIRS),
    ("below", "within"): ("as well without one: your text does not need its images:", False, PAIRS),
    ("below", "below"): ("and without one: its images make it worse:", False, HARM),
    ("below", "too few"): ("than with its own; too few documents to say whether", False, PAIRS + MORE),
    ("below", None): ("does better with another document's image than with its own:", False, PAIRS),
    ("too few", "above"): ("needs an image; too few documents to say whether it needs its own:", None, MORE),
    ("too few", "within"): ("as well without an image: your text does not need its images:", False, NEEDLESS),
    ("too few", "below"): ("does better without its images: they make it worse:", False, HARM),
    ("too few", "too few"): ("too few documents to say whether your text needs its images:", None, MORE),
    ("too few", None): ("too few documents to say whether your text needs its images:", None, MORE),
    (None, "above"): ("read from its images:", True, []),
    (None, "within"): (": your text does not need its images:", False, NEEDLESS),
    (None, "below"): ("does better without its images: they make it worse:", False, HARM),
    (None, "too few"): ("too few documents to say whether your text needs its images:", None, MORE),
}


def placed(**places):
    """A set that learnt, with a blank or another document's image where PLACES says."""
    one = {"loss": 1.0, "base_loss": 1.5, "intervals": {"loss": [0.9, 1.1], "learnt": [0.4, 0.6]}}
    keys = {"learnt": "base_loss", "shuffled": "shuffled_images_loss", "blank": "blank_images_loss"}
    for name, place in places.items():
        if place is not None:
            value, one["intervals"][name] = PLACES[place]
            one[keys[name]] = 1.0 + value
    if places.get("learnt") == "few":
        one["intervals"]["loss"] = None  # what is too few for one of these is too few for the other
    return one


@pytest.mark.parametrize("shuffled", [*PLACES, None])
@pytest.mark.parametrize("blank", [*PLACES, None])
def test_words_and_advice_on_images_are_those_of_both_intervals(shuffled, blank):
    found = verdict({"held": placed(shuffled=shuffled, blank=blank)}).sentences

    said_of_images = [one for one in found if one.kind == "images"]
    changes = [one.text for one in found if one.kind == "change"]
    if (SHORT.get(shuffled), SHORT.get(blank)) == (None, None):
        assert said_of_images == []
        return
    words, is_good, advice = IMAGES[SHORT.get(shuffled), SHORT.get(blank)]
    (sentence,) = said_of_images
    assert words in sentence.text and sentence.is_good is is_good
    assert [any(one in text for text in changes) for one in advice] == [True] * len(advice)
    asked = {text for one in (*NEEDLESS, *ANY, *PAIRS, *HARM, *MORE) for text in changes if one in text}
    wanted = {text for one in advice for text in changes if one in text}
    assert asked == wanted
    if not advice:
        assert changes == ["Nothing that was measured asks for a change."]
    else:
        assert not any("Nothing that was measured" in text for text in changes)


RAISE, LOWER, NOT_RAISE = "raise learning_rate", "lower learning_rate", "do not raise learning_rate"
LEARNT = {
    "above": ("learnt.", True),
    "within": ("nothing clearly learnt.", False),
    "below": ("worse than before.", False),
    "wide": ("nothing clearly learnt.", None),
    "few": ("the loss fell by 0.300 to 1.000, which may be chance", None),
    None: ("there is no base to compare with.", None),
}
KEPT = {
    "above": ("better than before.", True),
    "within": ("kept.", True),
    "below": ("forgotten.", False),
    "wide": ("too few documents to say whether it was kept.", None),
    "few": ("the loss fell by 0.300 to 1.000, which may be chance", None),
    None: ("there is no base to compare with.", None),
}
# What is said of learning_rate, and whether replay_share is to be raised: by what was learnt and kept.
RATES = {
    ("within", "below"): {NOT_RAISE, LOWER},
    ("below", "below"): {LOWER},
    "within": {RAISE},
    "below": {LOWER},
}


@pytest.mark.parametrize("learnt", LEARNT)
@pytest.mark.parametrize("kept", KEPT)
def test_words_and_advice_on_what_was_learnt_and_kept_do_not_contradict_each_other(learnt, kept):
    held, old = placed(learnt=learnt), placed(learnt=kept)
    for place, one in ((learnt, held), (kept, old)):
        if place is None:
            one["base_loss"] = one["intervals"]["learnt"] = None

    first, second, *rest = verdict({"held": held, "old": old}, ["old"]).sentences

    assert LEARNT[learnt][0] in first.text and first.is_good is LEARNT[learnt][1]
    assert KEPT[kept][0] in second.text and second.is_good is KEPT[kept][1]
    changes = " ".join(one.text for one in rest)
    rates = {NOT_RAISE} & {NOT_RAISE if NOT_RAISE in changes else ""}
    rates |= {RAISE} if RAISE in changes.replace(NOT_RAISE, "") else set()
    rates |= {LOWER} if LOWER in changes else set()
    wanted = RATES.get((learnt, kept), RATES.get(learnt, {LOWER} if kept == "below" else set()))
    assert rates == wanted
    assert ("raise replay_share" in changes) is (kept == "below")
    few = [name for name, place in (("held", learnt), ("old", kept)) if place in ("wide", "few")]
    assert (f"{', '.join(few)}: too few documents to be sure." in changes) is bool(few)
    calm = "Nothing that was measured asks for a change." in changes
    assert calm is (not wanted and not few and {learnt, kept} != {None})


def test_where_one_set_got_worse_another_does_not_ask_for_more_of_it():
    sets = {"a": placed(learnt="below"), "b": placed(learnt="within")}

    changes = said(sets)["change"]

    assert changes[0].startswith("a: worse than before: lower learning_rate")
    assert "b: little or nothing was learnt" in changes[1] and NOT_RAISE in changes[1]


def test_what_may_be_much_worse_is_not_told_to_raise_the_rate():
    may_be_worse = {"loss": 1.3, "base_loss": 1.0, "intervals": {"learnt": [-0.62, 0.02]}}

    learnt, *changes = verdict({"held": may_be_worse}).sentences

    assert (
        "nothing clearly learnt. The loss is 1.300, 0.300 more than before (95% interval -0.020"
        in learnt.text
    )
    assert NOT_RAISE in changes[0].text and "too few documents to be sure" in changes[1].text


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("retention", [[], ["held"]])
def test_a_loss_that_is_no_finite_number_cannot_be_judged(loss, retention):
    broken = {**numbers(base=1.5, shuffled=2.0, blank=3.0), "loss": loss}

    sentence, change = verdict({"held": broken}, retention).sentences

    assert sentence.text == "held: cannot be judged: its loss is no finite number." and not sentence.is_good
    assert change.text.startswith("held: a loss that is no finite number was measured:")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_base_that_is_no_finite_number_is_not_compared_with(bad):
    for retention in ([], ["held"]):
        sentence, change = verdict({"held": {**numbers(), "base_loss": bad}}, retention).sentences

        assert sentence.text.endswith(
            "the base's loss is no finite number, so what changed cannot be judged."
        )
        assert "a loss that is no finite number was measured" in change.text


@pytest.mark.parametrize("key", ["shuffled_images_loss", "blank_images_loss"])
def test_images_whose_loss_is_no_finite_number_are_not_judged(key):
    broken = {**numbers(base=1.5, shuffled=2.0, blank=3.0), key: float("nan")}

    _, images, change = verdict({"held": broken}).sentences

    assert images.text.startswith(
        "held: whether your text needs its images cannot be judged: the loss with a"
    )
    assert "nan" not in images.text and images.is_good is False
    assert "a loss that is no finite number was measured" in change.text


def test_an_interval_that_is_no_number_is_none():
    odd = {**placed(blank="above"), "intervals": {"learnt": [0.4, float("nan")], "blank": "0.1 to 0.2"}}

    learnt, images, *_ = verdict({"held": odd}).sentences

    assert "the loss fell by 0.500 to 1.000 (no interval was measured)" in learnt.text
    assert learnt.is_good is images.is_good is None


@pytest.mark.parametrize(("documents", "is_few"), [(1, True), (19, True), (20, False)])
def test_fewer_than_20_documents_are_said_beside_the_words(documents, is_few):
    held = {**numbers(base=2.0, shuffled=2.0, blank=3.0), "documents": documents}

    found = said({"held": held, "old": {**numbers(base=1.0), "documents": documents}}, ["old"])

    few = f", only {documents} document{'s' if documents > 1 else ''}" if is_few else ""
    assert found["learnt"][0].startswith(f"held{few}: learnt.")
    assert found["images"][0].startswith(f"held{few}: read from its images:")
    assert found["kept"][0].startswith(f"old{few}: kept.")
    asked = "held, old: few documents were measured. Measure 100 or more."
    assert found["change"] == [asked if is_few else "Nothing that was measured asks for a change."]


def test_what_to_change_follows_from_what_is_wrong():
    needless = numbers(base=1.0, shuffled=1.0, blank=1.0)

    changes = said({"held": needless, "old": numbers(base=1.0)}, ["old"])["change"]

    asked = ["raise learning_rate or num_train_epochs", "--reliance CHECKPOINT"]
    assert [any(one in text for text in changes) for one in asked] == [True] * 2


BROKEN = {"loss": float("nan"), "base_loss": 1.0}
ADVISED = {
    "needless": (numbers(shuffled=1.0, blank=1.0), ["inspect", "CONFIG", "--reliance", "CHECKPOINT"]),
    "pairs": (numbers(shuffled=0.5, blank=2.0), ["inspect", "CONFIG", "--html", "rows.html"]),
    "harm": (numbers(shuffled=0.5, blank=0.5), ["inspect", "CONFIG", "--html", "rows.html"]),
    "nothing": (numbers(base=1.0), ["inspect", "CONFIG"]),
    "nothing but harm": (numbers(base=0.96), ["inspect", "CONFIG"]),
    "broken": (
        BROKEN,
        ["eval", "CONFIG", "--checkpoint", "CHECKPOINT", "--per_document", "documents.jsonl"],
    ),
}


@pytest.mark.parametrize("case", ADVISED)
@pytest.mark.parametrize(
    ("config", "checkpoint"),
    [
        (None, None),
        (Path("my.yaml"), None),
        (Path("my runs/it's.yaml"), Path("runs/CONFIG {x}/checkpoint-8")),
        (Path("$(rm x)`y`.yaml"), Path("a;b")),
    ],
)
def test_commands_of_advice_are_read_by_a_shell_as_what_is_known(case, config, checkpoint):
    result, words = ADVISED[case]
    known = {"CONFIG": str(config or "CONFIG"), "CHECKPOINT": str(checkpoint or "CHECKPOINT")}
    paths = CommandPaths.of(config, checkpoint)

    found = verdict({"{config} CONFIG": result}, (), paths)

    (advice,) = [one.text for one in found.sentences if one.kind == "change" and "`vlcpt " in one.text]
    assert advice.startswith("{config} CONFIG: ")  # the name of the set is its own
    command = advice.partition("`vlcpt ")[2]
    command = command[: command.rindex("`")]
    assert shlex.split(command) == [known.get(word, word) for word in words]


def test_a_run_is_told_of_its_own_files():
    log = [{"step": step, "eval_new_loss": math.nan} for step in (0, 9)]

    found = verdict_of_run(log, (), CommandPaths.of(Path("my.yaml"), Path("out")))

    assert "`vlcpt eval my.yaml --checkpoint out --per_document documents.jsonl`" in str(found)


def test_a_good_run_is_asked_for_nothing():
    good = {"held": numbers(base=2.0, shuffled=2.0, blank=3.0), "old": numbers(base=1.0)}

    assert said(good, ["old"])["change"] == ["Nothing that was measured asks for a change."]


def test_few_documents_are_said_to_be_few():
    few = {"loss": 1.0, "base_loss": 1.5, "intervals": dict.fromkeys(("loss", "learnt", "shuffled", "blank"))}

    found = said({"held": few})

    assert found["learnt"] == [
        "held: the loss fell by 0.500 to 1.000, which may be chance: too few documents; "
        "perplexity 4.48 → 2.72."
    ]
    assert found["change"] == ["held: too few documents to be sure. Measure 100 or more."]


def test_many_documents_whose_base_has_no_interval_are_not_called_few():
    """As at the end of a full run: its base is gone, and only the log knows what it had."""
    many = {**numbers(base=2.0, shuffled=2.0, blank=3.0), "documents": 48}
    many["intervals"] = {**many["intervals"], "loss": [0.9, 1.1], "learnt": None}

    found = said({"held": many, "old": {**many, "base_loss": 0.8}}, ["old"])

    assert found["learnt"] == [
        "held: the loss fell by 1.000 to 1.000 (no interval was measured); perplexity 7.39 → 2.72."
    ]
    assert found["kept"][0].startswith("old: the loss rose by 0.200 to 1.000 (no interval was measured)")
    assert not any("too few" in text for texts in found.values() for text in texts)


def test_few_documents_get_no_check_and_no_fault():
    """Whatever the numbers: of images, too, and of what was kept."""
    few = {**numbers(base=1.058, shuffled=-0.786, blank=-0.5), "documents": 3}
    few["intervals"] = dict.fromkeys(few["intervals"])

    found = verdict({"held": few, "old": few}, ["old"]).sentences

    assert [one.is_good for one in found] == [None] * len(found)
    assert "too few documents to say whether your text needs its images" in found[1].text
    assert (
        "old, only 3 documents: the loss fell by 0.058 to 1.000, which may be chance: too few documents"
        in found[2].text
    )


def test_kept_is_said_only_where_the_interval_allows_little_forgetting():
    wide = {"loss": 4.0, "base_loss": 6.415, "documents": 6, "intervals": {"learnt": [-0.610, 17.858]}}

    kept, change = verdict({"old": wide}, ["old"]).sentences

    assert kept.text.startswith(
        "old, only 6 documents: too few documents to say whether it was kept. The loss is 4.000"
    )
    assert "a change of -2.415 (95% interval -17.858 to 0.610)" in kept.text
    assert kept.is_good is None
    assert change.text == "old: too few documents to be sure. Measure 100 or more."


def test_a_wide_interval_says_neither_that_images_are_needed_nor_that_they_are_not():
    wide = numbers(base=1.5, shuffled=1.5, blank=1.5, width=2.0)

    learnt, images, change = verdict({"held": {**wide, "documents": 512}}).sentences

    assert learnt.is_good is images.is_good is None
    assert "Measure more of them (eval_max_documents)" in change.text


def test_an_image_of_another_document_that_serves_as_well_gets_its_own_advice():
    (change,) = said({"held": numbers(base=2.0, shuffled=1.0, blank=2.0)})["change"]

    assert change.startswith("held: another document's image serves as well")
    assert "--reliance" not in change


def test_a_file_gets_each_sentence_as_one_line():
    file = StringIO()
    console = Console(file=file, width=60)

    console.print(verdict({"held": numbers(base=1.0)}), soft_wrap=not console.is_terminal)

    first, *_ = file.getvalue().splitlines()
    assert first.startswith("held: nothing clearly learnt.") and first.endswith(".")
    assert len([line for line in file.getvalue().splitlines() if line.startswith("  • ")]) == 1


def test_losses_without_intervals_are_spoken_of_without_them():
    """As training measures them, at its start and its end."""
    found = said({"held": {"loss": 1.0, "base_loss": 1.5}})

    assert found["learnt"] == [
        "held: the loss fell by 0.500 to 1.000 (no interval was measured); perplexity 4.48 → 2.72."
    ]
    assert found["change"] == ["Nothing that was measured asks for a change."]


@pytest.mark.parametrize("width", range(60, 100))
def test_no_word_is_cut_after_wide_characters(width):
    file = StringIO()
    found = verdict({"扫描手册": numbers(base=2.0, shuffled=1.0, blank=1.0)})

    Console(file=file, width=width, force_terminal=True, color_system=None).print(found)

    shown = " ".join(file.getvalue().split())
    assert all(one.text in shown for one in found.sentences)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_terminal_of_any_width_shows_all_of_it(width):
    file = StringIO()
    found = verdict({"held [red]\x1b[2J": numbers(base=2.0, shuffled=2.0, blank=3.0)})

    Console(file=file, width=width).print(found)

    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "held [red]\\x1b[2J: learnt." in file.getvalue()
    assert "more with a blank image" in file.getvalue()
