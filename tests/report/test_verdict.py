"""Tests of vlcpt/report/verdict.py: what is said of which numbers."""

from io import StringIO

import pytest
from rich.console import Console

from vlcpt.report.verdict import verdict, verdict_of_run


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


def test_what_to_change_follows_from_what_is_wrong():
    needless = numbers(base=1.0, shuffled=1.0, blank=1.0)

    changes = said({"held": needless, "old": numbers(base=0.5)}, ["old"])["change"]

    asked = ["raise learning_rate or num_train_epochs", "raise replay_share", "--reliance CHECKPOINT"]
    assert [any(one in text for text in changes) for one in asked] == [True] * 3


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


def test_few_documents_get_no_check_and_no_fault():
    """Whatever the numbers: of images, too, and of what was kept."""
    few = {**numbers(base=1.058, shuffled=-0.786, blank=-0.5), "documents": 3}
    few["intervals"] = dict.fromkeys(few["intervals"])

    found = verdict({"held": few, "old": few}, ["old"]).sentences

    assert [one.is_good for one in found] == [None] * len(found)
    assert "too few documents to say whether your text needs its images" in found[1].text
    assert "old: the loss fell by 0.058 to 1.000, which may be chance: too few documents" in found[2].text


def test_kept_is_said_only_where_the_interval_allows_little_forgetting():
    wide = {"loss": 4.0, "base_loss": 6.415, "documents": 6, "intervals": {"learnt": [-0.610, 17.858]}}

    kept, change = verdict({"old": wide}, ["old"]).sentences

    assert kept.text.startswith("old: too few documents to say whether it was kept. The loss is 4.000")
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
