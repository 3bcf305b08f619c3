"""What to change in a configuration or its data, told from the ledger's numbers."""

from __future__ import annotations

from collections.abc import Sequence

from vlcpt.data.ledger import Ledger
from vlcpt.report.memory import MemoryEstimate

OWN_REASONS = ("without_targets", "overlong", "medium_too_large")  # all others are bad rows


def hints(
    ledger: Ledger,
    *,
    max_length: int,
    longest: int,
    mean_length: float,
    packing: bool,
    on_bad_data: str,
    max_bad_fraction: float,
    on_overlong: str,
    with_checkpointing: MemoryEstimate | None = None,
    max_steps: int = -1,
    steps_per_epoch: int = 1,
    markings: Sequence[str] = (),
) -> list[str]:
    """Advice, the most pressing first; nothing where all is well.

    Args:
        longest: Tokens of the longest document.
        mean_length: Tokens of a sample, on average.
        with_checkpointing: The memory of a device then, where it is off.
        max_steps: Steps asked for in place of epochs, if above 0.
        steps_per_epoch: Those of one pass.
        markings: How rows without a target get some, in the formats of the sources that have such rows.

    Example:
        >>> ledger = Ledger(["train"])
        >>> ledger.sources["train"].documents.update(read=4, used=3)
        >>> ledger.sources["train"].dropped_documents.update(json=1)
        >>> advice = hints(ledger, max_length=64, longest=30, mean_length=30.0, packing=True,
        ...                on_bad_data="error", max_bad_fraction=0.01, on_overlong="split")
        >>> advice[0]  # doctest: +ELLIPSIS
        '1 of 4 rows cannot be used, and training would stop at the first: mend them, or ...'
    """
    total = ledger.total
    documents, dropped = total.documents, total.dropped_documents
    advice = _bad_rows(ledger, on_bad_data, max_bad_fraction)
    if count := dropped["medium_too_large"]:
        advice.append(
            f"{_documents(count)} with a medium that fits no pack: lower max_pixels (or fps, max_frames) as "
            "the message says, or raise max_length."
        )
    if count := dropped["overlong"]:
        stops = ", and training would stop at the first" if on_overlong == "error" else ""
        advice.append(
            f"{_documents(count)} longer than max_length {max_length:,}{stops}: set on_overlong: split, "
            "or raise max_length."
        )
    if count := dropped["without_targets"]:
        advice.append(
            " ".join((f"{_documents(count)} without a target.", *markings, "Or take them out of the data."))
        )
    if 0 < max_steps < steps_per_epoch:
        advice.append(
            f"max_steps {max_steps:,} is less than one pass of {steps_per_epoch:,} steps, and documents in "
            "the others are never trained: raise it, or set num_train_epochs instead."
        )
    if documents["split"] > 0.05 * documents["used"]:
        advice.append(
            f"{documents['split']:,} of {_documents(documents['used'])} split into parts: with max_length "
            f"{_round_up(longest):,} the longest would stay whole."
        )
    if ledger.fill is not None and ledger.fill < 0.9 and ledger.packs >= 10:
        advice.append(
            f"packs are only {ledger.fill:.0%} full, because samples of {mean_length:,.0f} tokens on "
            f"average do not fit together: raise max_length ({2 * max_length:,}), or lower max_pixels."
        )
    if not packing and mean_length < 0.5 * max_length and ledger.samples > 1:
        advice.append(
            f"samples have {mean_length:,.0f} of {max_length:,} tokens on average: with packing: "
            "true several share a row."
        )
    for name, one in ledger.sources.items():
        untagged, tagged = one.documents["untagged"], one.documents["used"] - one.documents["untagged"]
        if untagged and tagged > 0:
            advice.append(
                f"{_documents(untagged)} of {name} without any tag, among others that have some: untagged "
                "says whether all of the text is trained, none, or it is an error."
            )
    if total.tokens["trimmed"] > 0.2 * max(total.tokens["read"], 1):
        advice.append(
            f"{total.tokens['trimmed'] / total.tokens['read']:.0%} of all tokens come after the last target "
            "of their document and teach nothing: they are left away."
        )
    advice += _shares(ledger)
    if with_checkpointing is not None and with_checkpointing.total > 2**30:
        advice.append(
            f"with activation_checkpointing: true a device needs {with_checkpointing.total / 2**30:,.1f} "
            "GiB, for a third more time. It is on by itself where there is a GPU."
        )
    return advice


def _bad_rows(ledger: Ledger, on_bad_data: str, max_bad_fraction: float) -> list[str]:
    total = ledger.total
    read = max(total.documents["read"], 1)
    bad = sum(count for reason, count in total.dropped_documents.items() if reason not in OWN_REASONS)
    if not bad:
        return []
    if on_bad_data == "error":
        return [
            f"{bad:,} of {read:,} rows cannot be used, and training would stop at the first: mend them, or "
            "set on_bad_data: skip."
        ]
    worst = max(
        sum(count for reason, count in one.dropped_documents.items() if reason not in OWN_REASONS)
        / max(one.documents["read"], 1)
        for one in ledger.sources.values()
    )
    if worst > max_bad_fraction:
        return [
            f"{bad:,} of {read:,} rows cannot be used, more than max_bad_fraction {max_bad_fraction:g} of a "
            f"source, and training would stop: mend them, or set max_bad_fraction above {worst:.3g}."
        ]
    return [f"{bad:,} of {read:,} rows cannot be used and would be skipped: mend them to use them."]


def _shares(ledger: Ledger) -> list[str]:
    advice = []
    for name, one in ledger.sources.items():
        passes = 1 + one.documents["repeats"] / max(one.documents["used"], 1)
        if passes > 3:
            advice.append(
                f"{name} is read {passes:.1f} times in one pass to reach its share: lower the share, or add "
                "documents, or it will be learnt by heart."
            )
        asked, realised = one.share_asked, one.share_realised
        if asked and realised is not None and abs(realised - asked) > max(0.02, 0.1 * asked):
            advice.append(
                f"{name} has {realised:.1%} of the targets where {asked:.1%} was asked: its documents are "
                "too few or too long to come nearer."
            )
    return advice


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _round_up(tokens: int) -> int:
    """To a multiple of 256, as lengths are mostly given."""
    return -(-tokens // 256) * 256
