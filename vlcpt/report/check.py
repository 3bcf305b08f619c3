"""What ``vlcpt check`` shows: tables, problems by kind, and what to change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vlcpt.data.formats.unread import list_unread
from vlcpt.data.plan.ledger import Dropped, Ledger, SourceLedger
from vlcpt.report.memory import CONTEXT, MemoryEstimate
from vlcpt.report.screen import Sheet

_FEW_STEPS = 20  # fewer leave the learning rate nothing to work in
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
    steps: int | None = None,
    markings: Sequence[str] = (),
    trained_too: Sequence[str] = (),
) -> list[str]:
    """Advice, the most pressing first; nothing where all is well.

    Args:
        longest: Tokens of the longest document.
        mean_length: Tokens of a sample, on average.
        with_checkpointing: The memory of a device then, where it is off.
        max_steps: Steps asked for in place of epochs, if above 0.
        steps_per_epoch: Those of one pass.
        steps: Those of all passes.
        trained_too: Sets of held-out data that are also trained.
        markings: How rows without a target get some, in the formats of the sources that have such rows.

    Example:
        >>> ledger = Ledger(["train"])
        >>> ledger.sources["train"].documents.update(read=4, used=3)
        >>> ledger.sources["train"].dropped_documents.update(json=1)
        >>> advice = hints(ledger, max_length=64, longest=30, mean_length=30.0, packing=True,
        ...                on_bad_data="error", max_bad_fraction=0.01, on_overlong="split")
        >>> advice[0]  # doctest: +ELLIPSIS
        '1 of 4 rows cannot be used, and training would stop at the first: repair them, or ...'
    """
    advice = [
        *_bad_rows(ledger, on_bad_data, max_bad_fraction),
        *_unused(ledger, max_length, on_overlong, markings),
        *_trained_too(trained_too),
        *_steps(max_steps, steps_per_epoch, steps),
        *_lengths(ledger, max_length, longest, mean_length, packing),
        *_marks(ledger),
        *_shares(ledger),
    ]
    if with_checkpointing is not None and with_checkpointing.total > 2**30:
        advice.append(
            f"with activation_checkpointing: true a device needs {with_checkpointing.total / 2**30:,.1f} "
            "GiB, and a third more time. By default it is on where a GPU would be more than 70% full."
        )
    return advice


def _trained_too(names: Sequence[str]) -> Iterator[str]:
    """About held-out data that is none."""
    if names:
        yield (
            f"{', '.join(names)}: the same data is trained, so that its loss shows what was memorised: "
            "measure documents that are not trained."
        )


def _steps(max_steps: int, steps_per_epoch: int, steps: int | None) -> Iterator[str]:
    """About too few steps to read all, or to learn."""
    if 0 < max_steps < steps_per_epoch:
        yield (
            f"max_steps {max_steps:,} is less than one pass of {steps_per_epoch:,} steps, and documents in "
            "the others are never trained: raise it, or set num_train_epochs instead."
        )
    if max_steps <= 0 and steps is not None and steps < _FEW_STEPS:
        yield (
            f"{steps} step{'s' * (steps != 1)} in all, and the learning rate has few to rise and fall in: "
            "raise num_train_epochs, or lower max_length or gradient_accumulation_steps."
        )


def _unused(ledger: Ledger, max_length: int, on_overlong: str, markings: Sequence[str]) -> Iterator[str]:
    """About documents that can be read and are not used."""
    dropped = ledger.total.dropped_documents
    if count := dropped["medium_too_large"]:
        yield (
            f"{_documents(count)} with a medium that fits no pack: lower max_pixels (or fps, max_frames) as "
            "the message says, or raise max_length."
        )
    if count := dropped["overlong"]:
        stops = ", and training would stop at the first" if on_overlong == "error" else ""
        yield (
            f"{_documents(count)} longer than max_length {max_length:,}{stops}: set on_overlong: split, "
            "or raise max_length."
        )
    if count := dropped["without_targets"]:
        todo = [*markings, "Or take them out of the data."] if markings else ["Take them out of the data."]
        yield f"{_documents(count)} without a target. {' '.join(todo)}"


def _lengths(
    ledger: Ledger, max_length: int, longest: int, mean_length: float, packing: bool
) -> Iterator[str]:
    """About documents that are split, and packs that are not full."""
    documents = ledger.total.documents
    if documents["split"] > 0.05 * documents["used"]:
        length = -(-longest // 256) * 256  # a multiple of 256, as most people give
        yield (
            f"{documents['split']:,} of {_documents(documents['used'])} split into parts: with max_length "
            f"{length:,} the longest would stay in one."
        )
    if ledger.fill is not None and ledger.fill < 0.9 and ledger.packs >= 10:
        yield (
            f"packs are only {ledger.fill:.0%} full, because samples of {mean_length:,.0f} tokens on "
            f"average do not fit together: raise max_length ({2 * max_length:,}), or lower max_pixels."
        )
    if not packing and mean_length < 0.5 * max_length and ledger.samples > 1:
        yield (
            f"samples have {mean_length:,.0f} of {max_length:,} tokens on average: with packing: "
            "true several share a row."
        )


def _marks(ledger: Ledger) -> Iterator[str]:
    """About text without any tag, and after the last one."""
    for name, one in ledger.sources.items():
        untagged, tagged = one.documents["untagged"], one.documents["used"] - one.documents["untagged"]
        if untagged and tagged > 0:
            yield (
                f"{_documents(untagged)} of {name} without any tag, among others that have some: untagged "
                "says whether all of the text is trained, none, or it is an error."
            )
    tokens = ledger.total.tokens
    if tokens["trimmed"] > 0.2 * max(tokens["read"], 1):
        yield (
            f"{tokens['trimmed'] / tokens['read']:.0%} of all tokens come after the last target "
            "of their document and teach nothing: they are dropped."
        )


def _bad_rows(ledger: Ledger, on_bad_data: str, max_bad_fraction: float) -> list[str]:
    counts = [_bad(one) for one in (ledger.total, *ledger.sources.values())]
    bad, read = counts[0]
    if not bad:
        return []
    worst = max(one / max(rows, 1) for one, rows in counts[1:])
    settings = ["on_bad_data: skip"] if on_bad_data == "error" else []
    if worst > max_bad_fraction:
        settings.append(f"max_bad_fraction: {math.ceil(worst * 1000) / 1000:g}")
    rows = f"{bad:,} of {read:,} rows cannot be used"
    if not settings:
        return [f"{rows} and would be skipped: repair them to use them."]
    stops = "at the first" if on_bad_data == "error" else f"above max_bad_fraction {max_bad_fraction:g}"
    return [f"{rows}, and training would stop {stops}: repair them, or set {' and '.join(settings)}."]


def _bad(account: SourceLedger) -> tuple[int, int]:
    """Rows that cannot be used, and all."""
    dropped = account.dropped_documents.items()
    return sum(count for reason, count in dropped if reason not in OWN_REASONS), account.documents["read"]


def _shares(ledger: Ledger) -> Iterator[str]:
    for name, one in ledger.sources.items():
        passes = 1 + one.documents["repeats"] / max(one.documents["used"], 1)
        if passes > 3:
            yield (
                f"{name} is read {passes:.1f} times in one pass to reach its share: lower the share, or add "
                "documents, or the model will memorise it."
            )
        asked, realised = one.share_asked, one.share_realised
        if asked and realised is not None and abs(realised - asked) > max(0.02, 0.1 * asked):
            yield (
                f"{name} has {realised:.1%} of the targets where {asked:.1%} was asked: its documents are "
                "too few or too long to come nearer."
            )


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


_GIB = 2**30
# What differs between two messages of one kind: quoted names, paths and numbers.
_VARIES = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\S+\.\w{2,4}\b|\d[\d,.]*")
_MOMENTS = {
    "looking": "forward of vision",
    "learning": "start of backward",
    "stepping": "end of backward",
}


@dataclass(frozen=True)
class Course:
    """How long training takes, in steps.

    Args:
        items: Packs, or samples without packing, of one pass.
        devices: Processes.
        rows: Items on each, in one forward pass.
        accumulation: Forward passes of a step.
        epochs: Passes asked for.
        max_steps: Steps asked for instead, if above 0.

    Example:
        >>> course = Course(items=10, devices=2, rows=1, accumulation=2, epochs=3, max_steps=-1)
        >>> course.steps_per_epoch, course.steps
        (3, 9)
    """

    items: int
    devices: int
    rows: int
    accumulation: int
    epochs: float
    max_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; the last may be a smaller one."""
        batches = math.ceil(math.ceil(self.items / self.rows) / self.devices)
        return max(math.ceil(batches / self.accumulation), 1)

    @property
    def steps(self) -> int:
        """Optimizer steps in all, as Trainer counts them."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.epochs * self.steps_per_epoch)


@dataclass(frozen=True)
class Speed:
    """How long an epoch takes on a machine, and what keeps it busy.

    Args:
        machine: In words.
        devices: GPUs.
        seconds: Those of an epoch, at least and at most.
        assumes: What that rests on.
        loads: Seconds of one worker for a pack, on the machine that checks.
        workers: For each device, so that it does not wait at the fast bound.
        has_media: Whether there are images or videos to load.
    """

    machine: str
    devices: int
    seconds: tuple[float, float]
    assumes: str
    loads: float
    workers: int
    has_media: bool = True


def speed_lines(speed: Speed, configured: int) -> list[str]:
    """What is said of the speed of a run.

    Args:
        configured: ``dataloader_num_workers``.

    Example:
        >>> speed_lines(Speed("H100", 8, (3600.0, 7200.0), "2 PFLOP at 50%", 0.2, 3), configured=2)
        ... # doctest: +NORMALIZE_WHITESPACE
        ['an epoch on 8 × H100 takes 1.0 to 2.0 hours (2 PFLOP at 50%)',
         'a worker here loads a pack in 0.2 s: each GPU needs 3 workers to be kept busy; set
          dataloader_num_workers: 3 (now 2)']
    """
    gpus = speed.machine if speed.devices == 1 else f"{speed.devices} × {speed.machine}"
    needs = f"{speed.workers} worker{'s' * (speed.workers != 1)}"
    todo = f"dataloader_num_workers: {configured} is enough"
    if speed.workers > _MOST_WORKERS:
        ways = "vlcpt prepare" + ", a lower max_pixels or vision_cache" * speed.has_media
        todo = f"more than most have: {ways} makes loading cheaper"
    elif speed.workers > configured:
        todo = f"set dataloader_num_workers: {speed.workers} (now {configured})"
    return [
        f"an epoch on {gpus} takes {_lasts(*speed.seconds)} ({speed.assumes})",
        f"a worker here loads a pack in {speed.loads:.2g} s: each GPU needs {needs} to be kept busy; {todo}",
    ]


def loading_line(loads: float, packs: int, configured: int) -> str:
    """What is said of loading where the GPU is not known.

    Args:
        loads: Seconds of one worker for a pack, on the machine that checks.
        packs: Of one device in an optimizer step.
        configured: ``dataloader_num_workers``.

    Example:
        >>> loading_line(0.2, 8, configured=4)  # doctest: +NORMALIZE_WHITESPACE
        'a worker here loads a pack in 0.2 s, so a GPU whose step of 8 packs takes 1 s needs 2 workers
         (dataloader_num_workers is 4); --gpu NAME says how many yours needs'
    """
    workers = max(math.ceil(loads * packs), 1)
    step = f"{packs:,} pack{'s' * (packs != 1)}"
    return (
        f"a worker here loads a pack in {loads:.2g} s, so a GPU whose step of {step} "
        f"takes 1 s needs {workers:,} worker{'s' * (workers != 1)} (dataloader_num_workers is {configured}); "
        "--gpu NAME says how many yours needs"
    )


def _lasts(fast: float, slow: float) -> str:
    if slow < 1:
        return "less than a second"
    unit, name = next(one for one in _TIMES if slow >= one[0])
    return (
        f"{fast / unit:,.1f} {name}" if fast == slow else f"{fast / unit:,.1f} to {slow / unit:,.1f} {name}"
    )


_MOST_WORKERS = 32
_TIMES = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
_PLACES, _KINDS = 3, 12  # of documents with one problem, and of problems: so many are shown


@dataclass(frozen=True)
class Problem:
    """Documents that are not used, with messages that differ only in names and numbers.

    Args:
        reason: As in the ledger.
        count: Documents.
        message: That of the first.
        places: Where the first ones are.
    """

    reason: str
    count: int
    message: str
    places: Sequence[str]


def find_problems(dropped: Iterable[Dropped]) -> list[Problem]:
    """Why documents are not used; the most frequent is first.

    Example:
        >>> message = "'{}.png' does not exist."
        >>> rows = [Dropped("a.jsonl", line, None, "medium", message.format(line)) for line in (3, 7)]
        >>> [(one.count, one.places) for one in find_problems(rows)]
        [(2, ['a.jsonl:3', 'a.jsonl:7'])]
    """
    alike: dict[tuple[str, str], list[Dropped]] = {}
    for one in dropped:
        alike.setdefault((one.reason, _VARIES.sub("…", one.detail)), []).append(one)
    return [
        Problem(
            group[0].reason,
            len(group),
            group[0].detail,
            [f"{one.source}:{one.line}" + (f" ({one.id})" if one.id else "") for one in group[:_PLACES]],
        )
        for group in sorted(alike.values(), key=len, reverse=True)
    ]


def problem_lines(dropped: Iterable[Dropped]) -> list[str]:
    """The same for a person, in one line each: how many there are, the first message, and where.

    Example:
        >>> message = "'{}.png' does not exist."
        >>> rows = [Dropped("a.jsonl", line, None, "medium", message.format(line)) for line in (3, 7)]
        >>> problem_lines(rows)
        ["2 × medium: '3.png' does not exist. (a.jsonl:3, a.jsonl:7)"]
    """
    problems = find_problems(dropped)
    lines = []
    for one in problems[:_KINDS]:
        more = f" and {one.count - _PLACES:,} more" if one.count > _PLACES else ""
        reason, where = one.reason.replace("_", " "), ", ".join(one.places) + more
        lines.append(f"{one.count:,} × {reason}: {one.message} ({where})")
    if len(problems) > _KINDS:
        lines.append(f"{len(problems) - _KINDS:,} other kinds of message: see dropped.jsonl")
    return lines


def unread_lines(ledger: Ledger) -> list[str]:
    """The fields that were not read, a line for each source that has some.

    Example:
        >>> ledger = Ledger(["pages"])
        >>> ledger.sources["pages"].documents["not read: source"] = 12000
        >>> unread_lines(ledger)
        ['pages: not read: source (12,000 rows)']
    """
    return [
        f"{name}: {list_unread(source.not_read)}"
        for name, source in ledger.sources.items()
        if source.not_read
    ]


def course_table(
    course: Course, ledger: Ledger, longest: Sequence[tuple[str, int]], max_length: int
) -> Sheet:
    """Packs, fill, steps, and the longest documents.

    Example:
        >>> len(course_table(Course(8, 1, 1, 1, 1, -1), Ledger(["a"]), [("a.jsonl:3", 70)], 64).rows)
        4
    """
    rows = [("samples" if ledger.fill is None else "packs", f"{course.items:,}")]
    if ledger.fill is not None:
        rows.append(("fill", f"{ledger.fill:.1%}"))
    devices = f"{course.devices} process{'es' if course.devices > 1 else ''}"
    asked = f"{course.epochs:g} epoch{'s' * (course.epochs != 1)}"
    if course.max_steps > 0:
        asked = f"max_steps {course.max_steps}"
    rows += [
        (
            f"steps an epoch ({devices} × {course.rows} × {course.accumulation})",
            f"{course.steps_per_epoch:,}",
        ),
        (f"steps in all ({asked})", f"{course.steps:,}"),
    ]
    for place, (name, tokens) in enumerate(longest):
        rows.append((f"{'' if place else 'longest documents':<19}{name}", f"{tokens:,} tokens"))
    caption = f"max_length is {max_length:,} tokens" if longest else ""
    return Sheet("packs and steps", [""], [(label, [value]) for label, value in rows], caption)


def memory_table(estimates: Mapping[str, MemoryEstimate]) -> Sheet:
    """Memory of one device, a column for each way to train.

    Example:
        >>> one = MemoryEstimate("learning", 2**30, 0, 2**30, 2**30, 0, 0)
        >>> memory_table({"as configured": one}).rows[-1]
        ('most at once', ['3.00'])
    """
    found = list(estimates.values())
    most = max((one.total + one.host for one in found), default=0)
    unit, name = (_GIB, "GiB") if most >= _GIB else (2**20, "MiB")

    def row(label: str, part: str) -> tuple[str, list[str]]:
        return label, [f"{getattr(one, part) / unit:,.2f}" for one in found]

    parts = ("weights", "gradients", "optimizer", "activations", "logits", "inputs")
    rows = [*(row(part, part) for part in parts), row("most at once", "total")]
    if any(one.host for one in found):
        rows.append(row("offloaded, per device", "host"))
    moments = " / ".join(dict.fromkeys(_MOMENTS[one.moment] for one in found))
    caption = f"at: {moments}; CUDA itself takes about {CONTEXT / _GIB:g} GiB more"
    return Sheet(f"memory of one device, estimated, in {name}", [*estimates], rows, caption)
