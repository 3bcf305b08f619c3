"""What an evaluation says, in sentences: learnt, by the image, kept, what to change."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from vlcpt.eval_names import Number, measured_in
from vlcpt.report.image_need import Place, Reading, reading
from vlcpt.report.numbers import as_number, brief, nats, perplexity_of
from vlcpt.report.screen import Sheet, visible

# Nats per target below which a difference is called none, however sure it is.
SMALL = 0.01
_FORGOTTEN = 0.05  # and above which more than a little is forgotten: perplexity is 5% higher
_LARGE = 0.1  # and above which "none" may not be said: a target with so much needs its image
_MANY = 100  # documents: with so many most intervals are narrow enough
_FEW = 20  # documents: that there are fewer is said beside the words
# Of differences to `loss`: name of the interval, key of the other loss, and what it says.
DIFFERENCES = {
    "learnt": ("base_loss", "less than before training"),
    "shuffled": ("shuffled_images_loss", "more with another document's image"),
    "blank": ("blank_images_loss", "more with a blank image"),
}
# Advice: `{config}` and `{checkpoint}` in its commands are filled in by CommandPaths.
_WORSE = (
    "worse than before: lower learning_rate, or train for fewer epochs. Check that eval_data is of the same "
    "kind as train_data."
)
_TARGETS = (
    "see with `vlcpt inspect {config}` that the targets are what you want learnt. Where pictures are of a "
    "new kind, set train_merger: true."
)
_NOTHING = f"little or nothing was learnt: raise learning_rate or num_train_epochs, and {_TARGETS}"
# Where more training would do harm, as far as it is known.
_NOTHING_BUT_HARM = (
    f"little or nothing was learnt, and training did or may do harm: do not raise learning_rate; {_TARGETS}"
)
_LOST = (
    "old knowledge was lost: raise replay_share (with replay_data of what is to be kept), or lower "
    "learning_rate."
)
_NOT_FINITE = (
    "a loss that is no finite number was measured: find its documents (`vlcpt eval {config} --checkpoint "
    "{checkpoint} --per_document documents.jsonl`), and measure an earlier checkpoint."
)
_OTHER_IMAGES = {
    "shuffled_images_loss": "another document's image",
    "blank_images_loss": "a blank image",
}
Kind = Literal["learnt", "images", "kept", "change"]


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

    @property
    def place(self) -> Place | None:
        """Where its interval lies; None where nobody looked for one."""
        if not (self.has_interval or self.why):
            return None
        if not self.is_none:
            return "above" if self.value > 0 else "below"
        return "within" if self.is_below(_LARGE) else "unsure"

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
class CommandPaths:
    """What the commands in advice name, as a shell reads it; a placeholder where it is not known.

    Args:
        config: The configuration, with what was typed beside it.
        checkpoint: What was measured.
    """

    config: str = "CONFIG"
    checkpoint: str = "CHECKPOINT"

    @classmethod
    def of(cls, config: Path | None = None, checkpoint: Path | None = None) -> CommandPaths:
        """Those of files, quoted where a shell needs it; None: not known.

        Example:
            >>> CommandPaths.of(Path("my run.yaml"))
            CommandPaths(config="'my run.yaml'", checkpoint='CHECKPOINT')
        """
        known = {"config": config, "checkpoint": checkpoint}
        return cls(**{name: shlex.quote(str(path)) for name, path in known.items() if path is not None})

    def fill(self, advice: str) -> str:
        """The advice with commands to copy.

        Example:
            >>> CommandPaths("my.yaml").fill("see `vlcpt inspect {config} --reliance {checkpoint}`")
            'see `vlcpt inspect my.yaml --reliance CHECKPOINT`'
        """
        return advice.format(config=self.config, checkpoint=self.checkpoint)


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


def verdict(
    results: Mapping[str, Mapping[str, object]],
    retention: Collection[str] = (),
    paths: CommandPaths = CommandPaths(),
) -> Verdict:
    """Say what the numbers of an evaluation mean.

    Args:
        results: By name of the set, what ``vlcpt eval --output`` writes under ``sets``. Base and images that
            were not measured are not spoken of.
        retention: The sets that hold what the model knew before; the others are held-out documents of the
            new domain.
        paths: What the commands in its advice name.
    """
    sentences: list[Sentence] = []
    for name, one in results.items():
        loss, title = _number(one, "loss"), _titled(name, one)
        if loss is None:
            kind: Kind = "kept" if name in retention else "learnt"
            sentences += [Sentence(kind, f"{name}: cannot be judged: its loss is no finite number.", False)]
            continue
        sentences += [_kept(title, one, loss) if name in retention else _learnt(title, one, loss)]
        sentences += [] if name in retention else _images(title, one)
    changes = [*dict.fromkeys(_changes(results, retention, paths))]
    sentences += [Sentence("change", text) for text in changes]
    return Verdict(tuple(sentences), _table(results))


def verdict_of_run(
    log: Iterable[Mapping[str, object]],
    retention: Collection[str] = (),
    paths: CommandPaths = CommandPaths(),
) -> Verdict | None:
    """What the evaluations before step 1 and at the end of a run say; None where one of them was not made.

    Args:
        log: Its lines, as in ``train_log.jsonl`` and ``trainer.state.log_history``.
        retention, paths: See :func:`verdict`.

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
    return replace(verdict(results, retention, paths), table=None) if results else None


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
    if not isinstance(intervals, Mapping):
        return Difference(other - loss)
    bounds = intervals.get(name)
    if not isinstance(bounds, list | tuple):
        # A base that only the run's log knows has a loss and no documents: more of them would not help.
        is_logged = name == "learnt" and intervals.get("loss") is not None
        return Difference(other - loss, why="" if is_logged else "too few documents for an interval")
    low, high = map(as_number, bounds) if len(bounds) == 2 else (None, None)
    return Difference(other - loss, *((None, None) if low is None or high is None else (low, high)))


def _number(result: Mapping[str, object], key: str) -> float | None:
    """A finite number of a set; None where there is none."""
    return as_number(result.get(key))


def _is_broken(result: Mapping[str, object], key: str) -> bool:
    """Whether a loss was measured and is no finite number."""
    value = result.get(key)
    return isinstance(value, float) and not math.isfinite(value)


def _titled(name: str, result: Mapping[str, object]) -> str:
    """The name of a set, with how many documents were measured where they are few."""
    documents = _number(result, "documents")
    if documents is None or documents >= _FEW:
        return name
    return f"{name}, only {documents:.0f} document{'' if documents == 1 else 's'}"


def _no_base(name: str, result: Mapping[str, object], loss: float, kind: Kind) -> Sentence:
    """That there is nothing to compare a loss with, or nothing that is a number."""
    start = f"{name}: loss {nats(loss)}, perplexity {_perplexity(loss)}"
    if not _is_broken(result, "base_loss"):
        return Sentence(kind, f"{start}; there is no base to compare with.")
    cannot = "the base's loss is no finite number, so what changed cannot be judged."
    return Sentence(kind, f"{start}; {cannot}", False)


def _perplexity(loss: float) -> str:
    return brief(perplexity_of(loss))


def _learnt(name: str, result: Mapping[str, object], loss: float) -> Sentence:
    found = difference(result, "learnt")
    if found is None:
        return _no_base(name, result, loss, "learnt")
    numbers = f"perplexity {_perplexity(loss + found.value)} → {_perplexity(loss)}"
    if found.value == 0 and found.low in (None, 0) and found.high in (None, 0):
        return Sentence("learnt", f"{name}: exactly what the base gives, loss {nats(loss)}.", False)
    if not found.has_interval:
        return Sentence("learnt", f"{name}: {_moved(found, loss)}; {numbers}.")
    if found.is_none:
        words = f"nothing clearly learnt. The loss is {nats(loss)}"
        less = found if found.value >= 0 else -found
        change = f"{nats(less.value)} {'less' if less is found else 'more'} than before{less.interval}"
        is_good = False if found.is_below(_LARGE) else None
        return Sentence("learnt", f"{name}: {words}, {change}; {numbers}.", is_good)
    if found.value < 0:
        text = f"{name}: worse than before. The loss is {nats(loss)}, {nats(-found.value)} more"
        return Sentence("learnt", f"{text}{(-found).interval}; {numbers}.", False)
    text = f"{name}: learnt. The loss is {nats(loss)}, {nats(found.value)} less than before"
    return Sentence("learnt", f"{text}{found.interval}; {numbers}.", True)


def _images(name: str, result: Mapping[str, object]) -> list[Sentence]:
    shuffled, blank = difference(result, "shuffled"), difference(result, "blank")
    if broken := [words for key, words in _OTHER_IMAGES.items() if _is_broken(result, key)]:
        what = f"the loss with {' and with '.join(broken)} is no finite number"
        text = f"{name}: whether your text needs its images cannot be judged: {what}."
        return [Sentence("images", text, False)]
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
    if (found := _reading(result)) is None:
        return [Sentence("images", f"{name}: {numbers.removesuffix('.')} (no interval was measured).")]
    return [Sentence("images", f"{name}: {found.words}: {numbers}", found.is_good)]


def _reading(result: Mapping[str, object]) -> Reading | None:
    """How a text reads its images, as far as intervals show it; None where nobody looked for one."""
    if any(_is_broken(result, key) for key in _OTHER_IMAGES):
        return None
    shuffled, blank = difference(result, "shuffled"), difference(result, "blank")
    return reading(None if shuffled is None else shuffled.place, None if blank is None else blank.place)


def _moved(found: Difference, loss: float) -> str:
    """How a loss changed, where no interval says how sure that is."""
    way = "fell" if found.value >= 0 else "rose"
    sure = ", which may be chance: too few documents" if found.why else " (no interval was measured)"
    return f"the loss {way} by {nats(abs(found.value))} to {nats(loss)}{sure}"


def _kept(name: str, result: Mapping[str, object], loss: float) -> Sentence:
    learnt = difference(result, "learnt")
    if learnt is None:
        return _no_base(name, result, loss, "kept")
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


def _changes(
    results: Mapping[str, Mapping[str, object]], retention: Collection[str], paths: CommandPaths
) -> Iterator[str]:
    """What to change, the most pressing first; one line where nothing asks for a change."""
    asked: dict[str, list[str]] = {}
    is_compared = False
    for name, one in results.items():
        if _number(one, "loss") is None or any(_is_broken(one, key) for key in ("base_loss", *_OTHER_IMAGES)):
            asked.setdefault(_NOT_FINITE, []).append(name)
        learnt = difference(one, "learnt")
        is_compared |= learnt is not None
        change = None if learnt is None else _change(learnt, name in retention)
        if change is not None:
            asked.setdefault(change, []).append(name)
        found = None if name in retention else _reading(one)
        if found is not None and found.advice is not None:
            asked.setdefault(found.advice, []).append(name)
    if _WORSE in asked or _LOST in asked:  # raising what did harm would do more
        asked.setdefault(_NOTHING_BUT_HARM, []).extend(asked.pop(_NOTHING, []))
    for name, one in results.items():
        if (more := _more_documents(one, name in retention)) is not None:
            asked.setdefault(more, []).append(name)
    order = [_NOT_FINITE, _WORSE, _NOTHING, _NOTHING_BUT_HARM, _LOST]
    for text in sorted(asked, key=lambda text: order.index(text) if text in order else len(order)):
        if asked[text]:
            yield f"{', '.join(asked[text])}: {paths.fill(text)}"
    if not any(asked.values()) and is_compared:
        yield "Nothing that was measured asks for a change."


def _change(learnt: Difference, is_retention: bool) -> str | None:
    """What to change where a set's loss fell by so much."""
    if not learnt.is_none:
        return None if learnt.value > 0 else _LOST if is_retention else _WORSE
    if is_retention or not learnt.is_below(_LARGE):
        return None
    return _NOTHING if (-learnt).is_below(_LARGE) else _NOTHING_BUT_HARM


def _more_documents(result: Mapping[str, object], is_retention: bool) -> str | None:
    """That more documents would say more, and how to measure them; None where they would not."""
    documents = _number(result, "documents") or 0
    if _number(result, "loss") is None:
        return None
    if _is_unsure(result, is_retention):
        much = f"{_MANY} or more" if documents < _MANY else "more of them (eval_max_documents)"
        return f"too few documents to be sure. Measure {much}."
    if 0 < documents < _FEW:
        return f"few documents were measured. Measure {_MANY} or more."
    return None


def _is_unsure(result: Mapping[str, object], is_retention: bool) -> bool:
    """Whether an interval is too wide, or there is none for want of documents."""
    intervals = result.get("intervals")
    if isinstance(intervals, Mapping) and "loss" in intervals and intervals["loss"] is None:
        return True
    found = None if is_retention else _reading(result)
    if found is not None and found.is_unsure:
        return True
    learnt = difference(result, "learnt")
    if learnt is None or not learnt.is_none:
        return False
    lost = -learnt
    if is_retention:
        return not lost.is_below(_FORGOTTEN)
    return not (learnt.is_below(_LARGE) and lost.is_below(_LARGE))


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
