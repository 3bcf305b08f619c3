"""What to change: each piece of advice where it helps, and nowhere else."""

from vlcpt.data.plan.ledger import Ledger
from vlcpt.report.check import hints
from vlcpt.report.memory import MemoryEstimate


def advice(**counts: int) -> str:
    """The advice on one source; ``dropped_medium=3`` counts three dropped documents."""
    ledger = Ledger(["train"])
    account, settings = ledger.sources["train"], {}
    ledger.packs, ledger.samples, ledger.fill = 100, 100, 0.99
    account.documents.update(read=100, used=100)
    for key, value in counts.items():
        if key.startswith("dropped_"):
            account.dropped_documents[key.removeprefix("dropped_")] = value
        elif key == "trimmed":
            account.tokens.update(read=100, trimmed=value)
        elif key in ("fill", "share_asked", "share_realised"):
            setattr(ledger if key == "fill" else account, key, value)
        elif key in ("untagged", "split", "repeats"):
            account.documents[key] = value
        else:
            settings[key] = value
    defaults = {
        "max_length": 1000,
        "longest": 1500,
        "mean_length": 700.0,
        "packing": True,
        "on_bad_data": "error",
        "max_bad_fraction": 0.01,
        "on_overlong": "split",
    }
    return "\n".join(hints(ledger, **(defaults | settings)))


def test_all_well_means_no_advice() -> None:
    assert advice() == ""


def test_bad_rows_stop_training_unless_they_are_skipped() -> None:
    """With all that must be set, at once."""
    rows = "3 of 100 rows cannot be used, and training would stop"
    assert advice(dropped_medium=3) == (
        f"{rows} at the first: repair them, or set on_bad_data: skip and max_bad_fraction: 0.03."
    )
    assert advice(dropped_medium=1).endswith("set on_bad_data: skip.")
    assert advice(dropped_medium=3, on_bad_data="skip") == (
        f"{rows} above max_bad_fraction 0.01: repair them, or set max_bad_fraction: 0.03."
    )
    assert "would be skipped" in advice(dropped_medium=1, on_bad_data="skip")


def test_a_medium_that_cannot_fit_asks_for_max_pixels() -> None:
    assert "lower max_pixels" in advice(dropped_medium_too_large=1)
    assert "rows cannot be used" not in advice(dropped_medium_too_large=1)


def test_overlong_documents_ask_for_splitting() -> None:
    assert "set on_overlong: split" in advice(dropped_overlong=1, on_overlong="drop")


def test_documents_without_a_target_ask_for_marks() -> None:
    found = advice(dropped_without_targets=2, markings=("Set targets: all.",))
    assert found == "2 documents without a target. Set targets: all. Or take them out of the data."


def test_steps_that_do_not_read_all_are_pointed_out() -> None:
    assert "max_steps 9 is less than one pass of 10 steps" in advice(max_steps=9, steps_per_epoch=10)
    assert advice(max_steps=10, steps_per_epoch=10) == advice(max_steps=-1, steps_per_epoch=10) == ""


def test_few_steps_are_pointed_out_unless_they_were_asked_for() -> None:
    assert advice(steps=1).startswith("1 step in all,")
    assert "raise num_train_epochs" in advice(steps=19)
    assert advice(steps=20) == advice(steps=5, max_steps=5) == ""


def test_held_out_data_that_is_trained_is_named() -> None:
    assert advice(trained_too=["new", "old"]).startswith("new, old: the same data is trained")


def test_many_split_documents_ask_for_the_length_that_holds_the_longest() -> None:
    assert "with max_length 1,536 the longest would stay in one" in advice(split=10)
    assert advice(split=2) == ""


def test_packs_that_are_not_full_ask_for_longer_ones() -> None:
    assert "packs are only 80% full" in advice(fill=0.8)


def test_short_samples_ask_for_packing() -> None:
    assert "with packing: true several share a row" in advice(packing=False, fill=None, mean_length=100.0)


def test_untagged_among_tagged_documents_are_pointed_out() -> None:
    assert "5 documents of train without any tag" in advice(untagged=5)
    assert advice(untagged=100) == ""


def test_text_after_the_last_target_is_pointed_out() -> None:
    assert "50% of all tokens come after the last target" in advice(trimmed=50)


def test_a_source_that_is_repeated_often_is_pointed_out() -> None:
    assert "train is read 5.0 times in one pass" in advice(repeats=400)


def test_a_share_that_is_missed_is_pointed_out() -> None:
    assert "train has 10.0% of the targets where 30.0% was asked" in advice(
        share_asked=0.3, share_realised=0.1
    )


def test_checkpointing_is_named_with_what_it_needs() -> None:
    needs = MemoryEstimate("learning", 5 * 2**30, 0, 0, 0, 0, 0)

    assert "with activation_checkpointing: true a device needs 5.0 GiB" in advice(with_checkpointing=needs)
