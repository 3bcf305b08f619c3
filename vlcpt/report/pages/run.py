"""The page of a run: its curves, its speed, where its tokens went, its settings and its verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import yaml

from vlcpt.report.numbers import arrow, as_number, brief, loss_ends, perplexity_of, short
from vlcpt.report.pages.base import render_page
from vlcpt.report.pages.charts import Chart, Curve, draw, running_mean
from vlcpt.report.pages.ledger import count, dropped_count, ledger_bars, ledger_sheet
from vlcpt.report.pages.reliance import QUESTION, cost_bars, reliance_chart
from vlcpt.report.run_record import Point, RunRecord, read_record
from vlcpt.report.screen import Sheet
from vlcpt.report.verdict import CommandPaths, Verdict, verdict, verdict_of_run
from vlcpt.run_files import duration

Fact = tuple[str, str, str]  # of a card: its label, its value, a note
PHASES = {
    "data_wait": "waiting for data",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
}
LEARNING = "Learning"
_MOST = 200  # rows of a table of evaluations
# Of pictures in eval.json, which may come from elsewhere: raster images only, as `vlcpt eval` writes them.
_PICTURE = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]{1,200000}={0,2}")


def run_page(folder: Path, *, evaluation: Path | None = None) -> str:
    """The page of one run, from the files in its folder; what is missing is said on it.

    Args:
        evaluation: What ``vlcpt eval --output`` wrote; by default ``eval.json`` in the folder.

    Example:
        >>> "train_log.jsonl is missing" in run_page(Path("nowhere"))
        True
    """
    run = read_record(folder, evaluation=evaluation)
    bars = cost_bars(run.results, run.retention)
    return render_page(
        "run.html.j2",
        title=run.name,
        lead=lead(run),
        state=state_of(run),
        facts=headline(run),
        verdict=verdict_on(run),
        missing=run.missing,
        # The bars stand below the curves of learning, and without these alone.
        sections=[(name, charts) for name, charts in sections(run) if charts or (bars and name == LEARNING)],
        evaluations=evaluations(run),
        reliance=bars,
        ledger=ledger_bars(run.ledger),
        ledger_table=ledger_sheet(run.ledger),
        dropped=[[text_of(one.get(key)) for key in ("id", "reason", "detail")] for one in run.dropped],
        dropped_more=max(0, dropped_count(run.ledger) - len(run.dropped)),
        towers=towers(run.facts),
        memory=memory_sheet(run.facts),
        settings=settings(run.config),
        command=text_of(run.facts.get("command")),
        versions_table=_texts(run.facts.get("versions")),
        samples=samples(run),
        versions={},
    )


@dataclass(frozen=True)
class State:
    """How a run stands.

    Args:
        word: In one word, or two.
        when: Since when, or of when that is.
        message: What ended it; empty of a good end.
    """

    word: str
    when: str
    message: str = ""


def state_of(run: RunRecord) -> State:
    """In which state a run is."""
    state, message = str(run.facts.get("state")), text_of(run.facts.get("message"))
    started, ended, written = (moment(run.facts.get(key)) for key in ("started", "ended", "written"))
    if state in ("finished", "failed", "interrupted"):
        return State(state, f"{started} to {ended}" if started and ended else ended, message)
    if run.is_killed:
        said = f"last written {written}; " if written else ""
        return State("killed", f"{said}no process holds its folder any more")
    if state == "running":
        return State(state, f"as of {written}; if that is long ago, it was killed" if written else "")
    if run.has_model:
        return State("finished", "as its folder holds a model")
    return State("not known", "neither an end nor a model is in its folder")


def lead(run: RunRecord) -> str:
    """Below the title: what was trained, and on what."""
    how = {"lora": "LoRA", "qlora": "QLoRA", "full": "full tuning"}.get(str(run.config.get("tuning")), "")
    base = text_of(run.config.get("model_name_or_path"))
    named = run.ledger.get("sources")
    data = ", ".join(map(str, named)) if isinstance(named, dict) else ""
    parts = [f"{how} of {base}" if how and base else base, f"on {data}" if data else ""]
    return " ".join(part for part in parts if part)


def headline(run: RunRecord) -> list[Fact]:
    """The numbers on top."""
    planned = as_number(run.facts.get("steps_planned"))
    steps = f"{run.steps:,}"
    found: list[Fact] = [("steps", steps, f"of {planned:,.0f}" if planned else "logged last")]
    if ends := training_ends(run):
        found.append(("training loss", arrow(*ends), "means over the first and last log lines"))
    retention = run.retention
    for name in run.sets:
        points = run.set_curve(name)
        kind = "retention" if name in retention else "held-out"
        label = f"{kind} loss, {name}"
        if len(points) > 1:
            perplexity = f"perplexity {arrow(perplexity_of(points[0][1]), perplexity_of(points[-1][1]))}"
            found.append((label, arrow(points[0][1], points[-1][1]), perplexity))
        elif points:
            found.append((label, brief(points[0][1]), f"at step {points[0][0]:,.0f}"))
        if relies := run.set_curve(name, "reliance"):
            value = arrow(relies[0][1], relies[-1][1]) if len(relies) > 1 else brief(relies[0][1])
            found.append((f"reliance on images, {name}", value, "nats per target that blank ones cost"))
    # The record of a killed run says how long it had taken when its page was written last, long before.
    if (seconds := as_number(run.facts.get("seconds"))) is not None and not run.is_killed:
        starts = as_number(run.facts.get("starts")) or 1
        found.append(("time", duration(seconds), f"{starts:.0f} starts" if starts > 1 else ""))
    is_running = run.facts.get("state") == "running" and not run.is_killed
    if is_running and (left := run.curve("eta_seconds")):
        written = moment(run.facts.get("written"))
        as_of = f", as of {written}" if written else ""
        found.append(("left", duration(left[-1][1]), f"at the pace of the last steps{as_of}"))
    if (rate := median_of(run, "targets_per_second")) is not None:
        found.append(("targets a second", f"{rate:,.0f}", waits(run)))
    if peaks := [value for _, value in run.curve("peak_memory_gib")]:
        found.append(("most memory", f"{max(peaks):.3g} GiB", "of one process"))
    return found


def waits(run: RunRecord) -> str:
    """How much of the time of a step went into waiting for data."""
    found = median_of(run, "data_wait")
    return "median" if found is None else f"median; {found:.0%} of the time waiting for data"


def median_of(run: RunRecord, key: str) -> float | None:
    """The median over the lines of the log; None where none has the key."""
    values = [value for _, value in run.curve(key)]
    return median(values) if values else None


def training_ends(run: RunRecord) -> tuple[float, float] | None:
    """The training loss, as a mean over the first and over the last lines of the log."""
    return loss_ends([value for _, value in run.curve("loss")])


def verdict_on(run: RunRecord) -> Verdict | None:
    """What was measured, in words: by ``vlcpt eval``, else by the evaluations of the run itself."""
    # A page is shown to others: it has no path of this machine, but what was typed from here.
    folder = Path(run.folder.name) if run.folder.is_absolute() else run.folder
    paths = CommandPaths.of(folder / "config.yaml" if run.config else None, folder if run.has_model else None)
    if run.evaluated:
        return verdict(run.evaluated, run.retention, paths)
    return verdict_of_run(run.log, run.retention, paths)


def sections(run: RunRecord) -> list[tuple[str, list[Chart]]]:
    """The charts by what they are about."""
    loss = run.curve("loss")
    mean = run.curve("loss_mean") or running_mean(loss)
    held = [name for name in run.sets if name not in run.retention]
    kept = [name for name in run.sets if name in run.retention]
    # A set looks the same in each chart.
    styles = {name: at for at, name in enumerate(held)}
    styles |= {name: at + max(2, len(held)) for at, name in enumerate(kept)}
    learning = [
        draw(
            *("loss", "Training loss", "nats per target, by step"),
            [Curve("each log line", loss, True, 0), Curve("mean of up to 10 lines", mean, style=0)],
        ),
        draw(
            "sources", "Training loss by source", "nats per target, by step", *_smoothed(run.curves("loss/"))
        ),
        draw(
            *("held", "Held-out loss", "nats per target, by step"),
            [Curve(name, run.set_curve(name), style=styles[name]) for name in held],
            note=_at_step_0(run, held),
            until=run.steps,
        ),
        draw(
            *("retention", "Retention loss", "nats per target, by step"),
            [Curve(name, run.set_curve(name), style=styles[name]) for name in kept],
            note="What the model knew before. Flat is good; higher than at step 0 is forgotten.",
            least=0.2,
            until=run.steps,
        ),
        reliance_chart(
            "reliance",
            QUESTION,
            [Curve(name, run.set_curve(name, "reliance"), style=styles[name]) for name in (*held, *kept)],
            note=_at_step_0(run, [*held, *kept]),
            until=run.steps,
        ),
    ]
    return [
        (LEARNING, [one for one in learning if one]),
        ("Speed and memory", [one for one in _machine(run) if one]),
        ("Optimizer", [one for one in _optimizer(run) if one]),
    ]


def _at_step_0(run: RunRecord, names: Sequence[str]) -> str:
    if any(points and points[0][0] == 0 for points in map(run.set_curve, names)):
        return "Step 0 is the base model."
    return ""


def _smoothed(curves: Mapping[str, list[Point]]) -> tuple[list[Curve]]:
    """Curves of sources; of a long log its running mean, or they would hide each other."""
    window = 10 if max(map(len, curves.values()), default=0) > 40 else 1
    return ([Curve(name, running_mean(points, window)) for name, points in curves.items()],)


def _machine(run: RunRecord) -> list[Chart | None]:
    """Charts of speed and memory."""
    phases, peaks = run.curves("seconds/"), run.curve("peak_memory_gib")
    times = [Curve(PHASES.get(name, name), points) for name, points in phases.items()]
    shares = {
        "waiting for data": "data_wait",
        "tokens in packs (fill)": "fill",
        "peak of the GPU (mfu)": "mfu",
    }
    return [
        draw(
            *("speed", "Targets a second", "all processes together, by step"),
            [Curve("targets a second", run.curve("targets_per_second"))],
            from_zero=True,
        ),
        draw("phases", "Time of a step", "seconds, by step", times, from_zero=True),
        draw(
            *("shares", "Data wait and use", "percent, by step"),
            [Curve(name, run.curve(key, 100.0)) for name, key in shares.items()],
            note="Much waiting for data: raise dataloader_num_workers, or prepare the data.",
            from_zero=True,
        ),
        draw(
            *("memory", "Most memory so far", "GiB, by step"),
            [Curve("of one process", peaks), Curve("foreseen for a device", foreseen_memory(run, peaks))],
            from_zero=True,
        ),
    ]


def foreseen_memory(run: RunRecord, peaks: Sequence[Point]) -> list[Point]:
    """What the run was foreseen to need of a GPU, a level line beside its peaks; empty where nobody knows."""
    memory = run.facts.get("memory")
    found = as_number(memory.get("foreseen_gib")) if isinstance(memory, dict) else None
    return [] if found is None or not peaks else [(peaks[0][0], found), (peaks[-1][0], found)]


def _optimizer(run: RunRecord) -> list[Chart | None]:
    """Charts of learning rates and gradients."""
    rates = run.curves("learning_rate/") or {"all": run.curve("learning_rate")}
    if len({tuple(points) for points in rates.values()}) == 1 and len(rates) > 1:
        rates = {", ".join(rates): next(iter(rates.values()))}
    return [
        draw(
            *("rates", "Learning rate", f"of {', '.join(rates)}, by step" if len(rates) == 1 else "by step"),
            [Curve(name, points) for name, points in rates.items()],
            from_zero=True,
        ),
        draw(
            *("gradient", "Gradient norm", "before clipping, by step"),
            [Curve("gradient norm", run.curve("grad_norm"))],
            from_zero=True,
        ),
    ]


def evaluations(run: RunRecord) -> Sheet | None:
    """Each evaluation with its losses, a column a set; behind them how far sets rely on their images."""
    columns = {name: run.set_curve(name) for name in run.sets}
    for name in run.sets:
        if relies := run.set_curve(name, "reliance"):
            columns[f"{name}, reliance"] = relies
    by_step: dict[float, dict[str, float]] = {}
    for label, points in columns.items():
        for step, value in points:
            by_step.setdefault(step, {})[label] = value
    rows = [
        (f"step {step:,.0f}", [short(found[label]) if label in found else "–" for label in columns])
        for step, found in sorted(by_step.items())
    ]
    if not rows:
        return None
    left_out = f"{len(rows) - _MOST:,} evaluations before these are left out." if len(rows) > _MOST else ""
    said = "Reliance: what blank images cost more." if len(columns) > len(run.sets) else ""
    caption = " ".join(filter(None, (said, left_out)))
    return Sheet("loss, nats per target", [*columns], rows[-_MOST:], caption)


def towers(facts: Mapping[str, object]) -> Sheet | None:
    """What trains, tower by tower."""
    found = facts.get("towers")
    rows = []
    for one in found if isinstance(found, list) else []:
        if isinstance(one, dict):
            trained, total = count(one.get("trained")), count(one.get("total"))
            cells = [text_of(one.get("how")), f"{trained:,}", f"{total:,}", text_of(one.get("dtype"))]
            rows.append((text_of(one.get("tower")), cells))
    return Sheet("what trains", ["how", "trained", "of", "held as"], rows) if rows else None


def memory_sheet(facts: Mapping[str, object]) -> str:
    """What was foreseen of the memory, in words."""
    memory = facts.get("memory")
    return text_of(memory.get("said")) if isinstance(memory, dict) else ""


def settings(config: Mapping[str, object]) -> list[tuple[str, str]]:
    """Each key of the configuration with its value, as YAML has it."""
    return [(str(key), yaml_text(value)) for key, value in config.items()]


def yaml_text(value: object) -> str:
    """A value of the configuration, on as few lines as YAML needs.

    Example:
        >>> print(yaml_text([{"path": "a.jsonl", "name": "new"}]))
        {path: a.jsonl, name: new}
    """
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        return "\n".join(yaml_text(one) for one in value)
    text = yaml.safe_dump(value, allow_unicode=True, sort_keys=False, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def samples(run: RunRecord) -> list[tuple[str, list[Mapping[str, object]]]]:
    """By set, documents that the model continued, beside what they say."""
    found = run.evaluation.get("samples")
    return [
        (str(name), [_sample(one) for one in given if isinstance(one, dict)])
        for name, given in (found.items() if isinstance(found, dict) else ())
        if isinstance(given, list)
    ]


def _sample(one: Mapping[str, object]) -> dict[str, object]:
    """A continued document, its images and videos as pairs of a picture, which may be empty, with a name."""
    texts: dict[str, object] = {
        # Without the part of a character that the limit of a continuation cut.
        key: text_of(one.get(key)).rstrip("\ufffd")
        for key in ("document", "before", "continuation", "truth")
    }
    names, small = _list_of_texts(one.get("media")), _list_of_texts(one.get("thumbnails"))
    small = [picture_of(text) for text in small[: len(names)]]  # of the last names: the others have none
    return texts | {"media": [*zip([""] * (len(names) - len(small)) + small, names, strict=True)]}


def _list_of_texts(value: object) -> list[str]:
    return [text_of(one) for one in value] if isinstance(value, list) else []


def picture_of(text: str) -> str:
    """An address that holds a picture; nothing of any other text.

    Example:
        >>> picture_of("data:image/png;base64,iVBORw==")
        'data:image/png;base64,iVBORw=='
        >>> picture_of("https://example.org/a.png"), picture_of("data:image/svg+xml;base64,iVBORw==")
        ('', '')
    """
    return text if _PICTURE.fullmatch(text) else ""


def text_of(value: object) -> str:
    """A text, or nothing of what is none."""
    return value if isinstance(value, str) else ""


def _texts(value: object) -> list[tuple[str, str]]:
    return [(str(name), str(one)) for name, one in value.items()] if isinstance(value, dict) else []


def moment(value: object) -> str:
    """A time of ``run.json`` for people.

    Example:
        >>> moment("2026-11-29T13:10:02+00:00")
        '2026-11-29 13:10 UTC'
    """
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError:
        return ""
    return found.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
