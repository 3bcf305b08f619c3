"""What an evaluation says, in sentences: learnt, by the image, kept, what to change."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vlcpt.eval_names import Number, measured_in
from vlcpt.report.numbers import brief, nats, perplexity_of
from vlcpt.report.screen import Sheet, visible

# Nats per target below which a difference is called none, however sure it is.
SMALL = 0.01
_FORGOTTEN = 0.05  # and above which more than a little is forgotten: perplexity is 5% higher
_LARGE = 0.1  # and above which "none" may not be said: a target with so much needs its image
_MANY = 100  # documents: with so many most intervals are narrow enough
# Of differences to `loss`: name of the interval, key of the other loss, and what it says.
DIFFERENCES = {
    "learnt": ("base_loss", "less than before training"),
    "shuffled": ("shuffled_images_loss", "more with another document's image"),
    "blank": ("blank_images_loss", "more with a blank image"),
}
_WORSE = (
    "Held-out documents got worse: lower learning_rate, or train for fewer epochs. Check that eval_data is "
    "of the same kind as train_data."
)
_NOTHING = (
    "Little or nothing was learnt: raise learning_rate or num_train_epochs, and see with `vlcpt inspect` "
    "that the targets are what you want learnt. Where pictures are of a new kind, set train_merger: true."
)
_LOST = (
    "Old knowledge was lost: raise replay_share (with replay_data of what is to be kept), or lower "
    "learning_rate."
)
_ANY_IMAGE = (
    "another document's image serves as well: the text says that there is a picture, not what is in it. Mark "
    "as trainable what only this picture shows, and check that each document has its own images."
)
_NEEDLESS = (
    "see with `vlcpt inspect CONFIG --reliance CHECKPOINT` which tokens need the picture. Mark with "
    "<trainable_text> what only the picture shows, and leave as context what follows from the text; check "
    "that each document has its own images."
)
Kind = Literal["learnt", "images", "kept", "change"]
Need = Literal["own", "any", "none", "unknown"]


@dataclass(frozen=True)
class Difference:
    """How many nats per target a loss is above the one with the right images after training.

    Args:
        value: The difference.
        low, high: Its 95% interval; None where there is none.
        why: Why there is none, where somebody looked for one.

    Example:
        >>> str(Difference(0.5, 0.4, 0.6)), Difference(0.02, -0.01, 0.05).is_none
        ('0.500 (95% interval 0.400 to 0.600)', True)
    """

    value: float
    low: float | None = None
    high: float | None = None
    why: str = ""

    @property
    def is_none(self) -> bool:
        """Whether it may be nothing: the interval reaches 0, or what is sure is small."""
        low, high = self.bounds
        return low <= SMALL and high >= -SMALL

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval."""
        return self.low is not None and self.high is not None

    @property
    def bounds(self) -> tuple[float, float]:
        """What it may be, at least and at most; the value itself where nobody looked for an interval.

        With too few documents for an interval it may be anything.
        """
        if self.low is not None and self.high is not None:
            return self.low, self.high
        return (-math.inf, math.inf) if self.why else (self.value, self.value)

    def is_below(self, bound: float) -> bool:
        """Whether all that it may be is at most ``bound``."""
        return self.bounds[1] <= bound

    def __neg__(self) -> Difference:
        return Difference(
            0.0 - self.value,
            None if self.high is None else 0.0 - self.high,
            None if self.low is None else 0.0 - self.low,
            self.why,
        )

    def __str__(self) -> str:
        return f"{nats(self.value)}{self.interval}"

    @property
    def interval(self) -> str:
        """The interval in words, in parentheses after a space; empty where nobody looked for one."""
        if self.low is None or self.high is None:
            return f" ({self.why})" if self.why else ""
        return f" (95% interval {nats(self.low)} to {nats(self.high)})"


@dataclass(frozen=True)
class Sentence:
    """One sentence of a verdict.

    Args:
        kind: What it is about.
        text: The sentence; it may hold names of sets.
        is_good: Whether that is as it should be; None where it is neither good nor bad.
    """

    kind: Kind
    text: str
    is_good: bool | None = None


@dataclass(frozen=True)
class Verdict:
    """What an evaluation says.

    Args:
        sentences: Set by set what was learnt, by the image, or kept; what to change last.
        table: The differences with their intervals, a column a set.

    Example:
        >>> found = verdict({"held": {"loss": 1.0, "base_loss": 1.5, "intervals": {"learnt": [0.4, 0.6]}}})
        >>> print(found.sentences[0].text.partition("; ")[2])
        perplexity 4.48 → 2.72.
    """

    sentences: tuple[Sentence, ...]
    table: Sheet | None

    def __str__(self) -> str:
        return "\n".join(one.text for one in self.sentences)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        styles = {True: "green", False: "yellow", None: ""}
        for one in self.sentences:
            if one.kind != "change":
                yield Text(visible(one.text), styles[one.is_good])
        if changes := [one for one in self.sentences if one.kind == "change"]:
            yield Text("what to change:", "bold")
            for one in changes:
                yield _point(Text(visible(one.text)), options)
        if self.table is not None:
            yield Text()
            yield self.table


def _point(text: Text, options: ConsoleOptions) -> RenderableType:
    """A point of a list, its further lines indented; in a file or a pipe one line."""
    if options.no_wrap:
        return Text("  • ") + text
    row = Table.grid()
    row.add_column()
    # rich cuts a line of wide characters that ends at the edge, unless it may fold it (rich 15).
    row.add_column(overflow="fold")
    row.add_row("  • ", text)
    return row


def verdict(results: Mapping[str, Mapping[str, object]], retention: Collection[str] = ()) -> Verdict:
    """Say what the numbers of an evaluation mean.

    Args:
        results: By name of the set, what ``vlcpt eval --output`` writes under ``sets``. Losses that are not
            there are not spoken of.
        retention: The sets that hold what the model knew before; the others are held-out documents of the
            new domain.
    """
    sentences: list[Sentence] = []
    for name, one in results.items():
        loss = _number(one, "loss")
        if loss is None:
            continue
        sentences += [_kept(name, one, loss) if name in retention else _learnt(name, one, loss)]
        sentences += [] if name in retention else _images(name, one)
    changes = [*dict.fromkeys(_changes(results, retention))]
    sentences += [Sentence("change", text) for text in changes]
    return Verdict(tuple(sentences), _table(results))


def verdict_of_run(log: Iterable[Mapping[str, object]], retention: Collection[str] = ()) -> Verdict | None:
    """What the evaluations before step 1 and at the end of a run say; None where one of them was not made.

    Args:
        log: Its lines, as in ``train_log.jsonl`` and ``trainer.state.log_history``.
        retention: See :func:`verdict`.

    How much blank images cost is said beside what they cost before step 1.

    Example:
        >>> log = [{"step": 0, "eval_new_loss": 6.0}, {"step": 9, "eval_new_loss": 2.0}]
        >>> print(str(verdict_of_run(log)).splitlines()[0])
        new: the loss fell by 4.000 to 2.000 (no interval was measured); perplexity 403 → 7.39.
    """
    before: dict[str, Mapping[Number, float]] = {}
    after: dict[str, Mapping[Number, float]] = {}
    for line in log:
        (before if line.get("step") == 0 else after).update(measured_in(line))
    results = {
        name: {
            **one,
            "base_loss": before[name]["loss"],
            **({"base_reliance": before[name]["reliance"]} if "reliance" in before[name] else {}),
        }
        for name, one in after.items()
        if name in before
    }
    return replace(verdict(results, retention), table=None) if results else None


def difference(result: Mapping[str, object], name: str) -> Difference | None:
    """What ``learnt``, ``shuffled`` or ``blank`` adds to the loss of a set; None where it was not measured.

    Example:
        >>> difference({"loss": 1.0, "blank_images_loss": 1.5}, "blank")
        Difference(value=0.5, low=None, high=None, why='')
    """
    loss, other = _number(result, "loss"), _number(result, DIFFERENCES[name][0])
    if loss is None or other is None:
        return None
    intervals = result.get("intervals")
    bounds = intervals.get(name) if isinstance(intervals, Mapping) else None
    low, high = bounds if isinstance(bounds, list | tuple) and len(bounds) == 2 else (None, None)
    why = "too few documents for an interval" if isinstance(intervals, Mapping) else ""
    return Difference(other - loss, low, high, why)


def _number(result: Mapping[str, object], key: str) -> float | None:
    value = result.get(key)
    return float(value) if isinstance(value, int | float) else None


def _perplexity(loss: float) -> str:
    return brief(perplexity_of(loss))


def _learnt(name: str, result: Mapping[str, object], loss: float) -> Sentence:
    found = difference(result, "learnt")
    if found is None:
        whole = (
            f"{name}: loss {nats(loss)}, perplexity {_perplexity(loss)}; there is no base to compare with."
        )
        return Sentence("learnt", whole)
    numbers = f"perplexity {_perplexity(loss + found.value)} → {_perplexity(loss)}"
    if found.value == 0 and found.low in (None, 0) and found.high in (None, 0):
        return Sentence("learnt", f"{name}: exactly what the base gives, loss {nats(loss)}.", False)
    if not found.has_interval:
        return Sentence("learnt", f"{name}: {_moved(found, loss)}; {numbers}.")
    if found.is_none:
        words = f"nothing clearly learnt. The loss is {nats(loss)}"
        change = f"{nats(found.value)} less than before{found.interval}"
        is_good = False if found.is_below(_LARGE) else None
        return Sentence("learnt", f"{name}: {words}, {change}; {numbers}.", is_good)
    if found.value < 0:
        text = f"{name}: worse than before. The loss is {nats(loss)}, {nats(-found.value)} more"
        return Sentence("learnt", f"{text}{(-found).interval}; {numbers}.", False)
    text = f"{name}: learnt. The loss is {nats(loss)}, {nats(found.value)} less than before"
    return Sentence("learnt", f"{text}{found.interval}; {numbers}.", True)


def _images(name: str, result: Mapping[str, object]) -> list[Sentence]:
    shuffled, blank = difference(result, "shuffled"), difference(result, "blank")
    if blank is None and shuffled is None:
        return []
    parts = []
    if shuffled is not None:
        parts.append(f"another document's image costs {shuffled}")
    if blank is not None:
        parts.append(f"a blank one {blank}" if parts else f"a blank image costs {blank}")
    before = _number(result, "base_reliance")
    numbers = f"{', '.join(parts)} nats a target"
    numbers += "." if before is None else f", and {nats(before)} before training."
    words = {
        "own": ("read from its images", True),
        "any": ("your text needs some image, but not its own", False),
        "none": ("your text does not need its images", False),
        "unknown": ("too few documents to say whether your text needs its images", None),
    }
    if (need := _need(result)) is None:
        return [Sentence("images", f"{name}: {numbers.removesuffix('.')} (no interval was measured).")]
    text, is_good = words[need]
    return [Sentence("images", f"{name}: {text}: {numbers}", is_good)]


def _need(result: Mapping[str, object]) -> Need | None:
    """Which image the text needs, as far as intervals show it; None where nobody looked for one."""
    shuffled, blank = difference(result, "shuffled"), difference(result, "blank")
    # Another document's image is as good an image, so that one alone shows whether this one is read.
    decisive = shuffled if shuffled is not None else blank
    if decisive is None or not (decisive.has_interval or decisive.why):
        return None
    if not decisive.is_none and decisive.value > 0:
        return "own"
    if not decisive.is_below(_LARGE):
        return "unknown"
    if blank is not None and not blank.is_none and blank.value > 0:
        return "any"
    return "none" if blank is None or blank.is_below(_LARGE) else "unknown"


def _moved(found: Difference, loss: float) -> str:
    """How a loss changed, where no interval says how sure that is."""
    way = "fell" if found.value >= 0 else "rose"
    sure = ", which may be chance: too few documents" if found.why else " (no interval was measured)"
    return f"the loss {way} by {nats(abs(found.value))} to {nats(loss)}{sure}"


def _kept(name: str, result: Mapping[str, object], loss: float) -> Sentence:
    learnt = difference(result, "learnt")
    if learnt is None:
        whole = (
            f"{name}: loss {nats(loss)}, perplexity {_perplexity(loss)}; there is no base to compare with."
        )
        return Sentence("kept", whole)
    lost = -learnt
    change = math.expm1(min(lost.value, 700))
    numbers = f"perplexity {_perplexity(loss - lost.value)} → {_perplexity(loss)}, {change:+.1%}"
    if lost.value == 0 and lost.low in (None, 0) and lost.high in (None, 0):
        return Sentence("kept", f"{name}: exactly what the base gives, loss {nats(loss)}.", True)
    if not lost.has_interval:
        return Sentence("kept", f"{name}: {_moved(learnt, loss)}; {numbers}.")
    if lost.is_none:
        is_kept = lost.is_below(_FORGOTTEN)
        words = "kept" if is_kept else "too few documents to say whether it was kept"
        text = f"{name}: {words}. The loss is {nats(loss)}, a change of {nats(lost.value)}"
        return Sentence("kept", f"{text}{lost.interval}; {numbers}.", True if is_kept else None)
    if lost.value < 0:
        words = f"better than before. The loss is {nats(loss)}, {nats(-lost.value)} less"
        return Sentence("kept", f"{name}: {words}{learnt.interval}; {numbers}.", True)
    words = "forgotten" if change > _FORGOTTEN else "a little forgotten"
    text = f"{name}: {words}. The loss is {nats(loss)}, {nats(lost.value)} more than before"
    return Sentence("kept", f"{text}{lost.interval}; {numbers}.", False)


def _changes(results: Mapping[str, Mapping[str, object]], retention: Collection[str]) -> Iterator[str]:
    """What to change, the most pressing first; one line where nothing asks for a change."""
    held = {name: one for name, one in results.items() if name not in retention}
    learnt = [found for one in held.values() if (found := difference(one, "learnt")) is not None]
    lost = [
        -found for name in retention if (found := difference(results.get(name, {}), "learnt")) is not None
    ]
    needs = {name: _need(one) for name, one in held.items()}
    needless, any_image = ([name for name, one in needs.items() if one == kind] for kind in ("none", "any"))
    unsure = [name for name, one in results.items() if _is_unsure(one, name in retention)]
    few = [name for name in unsure if (_number(results[name], "documents") or 0) < _MANY]
    many = [name for name in unsure if name not in few]
    asked = {
        _WORSE: any(not one.is_none and one.value < 0 for one in learnt),
        _NOTHING: any(one.is_none and one.is_below(_LARGE) for one in learnt),
        _LOST: any(not one.is_none and one.value > 0 for one in lost),
        f"{', '.join(needless)}: {_NEEDLESS}": bool(needless),
        f"{', '.join(any_image)}: {_ANY_IMAGE}": bool(any_image),
        f"{', '.join(few)}: too few documents to be sure. Measure {_MANY} or more.": bool(few),
        f"{', '.join(many)}: too few documents to be sure. Measure more of them (eval_max_documents).": bool(
            many
        ),
    }
    yield from (text for text, applies in asked.items() if applies)
    if not any(asked.values()) and (learnt or lost):
        yield "Nothing that was measured asks for a change."


def _is_unsure(result: Mapping[str, object], is_retention: bool) -> bool:
    """Whether more documents would say more."""
    intervals = result.get("intervals")
    if isinstance(intervals, Mapping) and "loss" in intervals and intervals["loss"] is None:
        return True
    if not is_retention and _need(result) == "unknown":
        return True
    learnt = difference(result, "learnt")
    if learnt is None or not learnt.is_none:
        return False
    return not ((-learnt).is_below(_FORGOTTEN) if is_retention else learnt.is_below(_LARGE))


def _table(results: Mapping[str, Mapping[str, object]]) -> Sheet | None:
    """The differences of each set with their intervals; None where there are none."""
    rows = []
    for name, (_, label) in DIFFERENCES.items():
        found = [difference(one, name) for one in results.values()]
        if any(one is not None for one in found):
            rows.append((label, ["–" if one is None else nats(one.value) for one in found]))
            if any(one is not None and one.low is not None for one in found):
                rows.append(("  95% interval", [_span(one) for one in found]))
    caption = "nats per target; intervals over documents"
    return Sheet("verdict", [*results], rows, caption) if rows else None


def _span(found: Difference | None) -> str:
    if found is None or found.low is None or found.high is None:
        return "–"
    return f"{nats(found.low)} to {nats(found.high)}"
