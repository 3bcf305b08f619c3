"""The page that compares runs: their curves over each other, what differs in settings and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlcpt.eval_names import Number
from vlcpt.report.numbers import arrow, as_number, brief, signed
from vlcpt.report.pages.base import render_page
from vlcpt.report.pages.charts import Chart, Curve, draw, running_mean
from vlcpt.report.pages.reliance import QUESTION, cost_bars, reliance_chart
from vlcpt.report.pages.run import median_of, state_of, training_ends, verdict_on, yaml_text
from vlcpt.report.run_record import Point, RunRecord, read_record
from vlcpt.report.screen import Sheet
from vlcpt.run_files import duration

_PLACES = ("output_dir",)  # of each run its own, and nothing that it did otherwise
_NONE = "–"


def comparison_page(folders: Sequence[Path]) -> str:
    """The page of several runs, from the files in their folders.

    Example:
        >>> page = comparison_page([Path("nowhere/a"), Path("nowhere/b")])
        >>> "a, b" in page
        True
    """
    runs = [read_record(folder, name=name) for folder, name in zip(folders, distinct(folders), strict=True)]
    return render_page(
        "comparison.html.j2",
        title=f"{len(runs)} runs compared",
        lead=", ".join(run.name for run in runs),
        states=[(run.name, state_of(run)) for run in runs],
        verdicts=[(run.name, found) for run in runs if (found := verdict_on(run))],
        results=results(runs),
        settings=differences([run.config for run in runs]),
        names=[run.name for run in runs],
        charts=[one for one in charts(runs) if one],
        reliance=cost_bars(_all_results(runs), ()),
        missing=[f"{run.name}: {text}" for run in runs for text in run.missing],
        versions={},
    )


def distinct(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: as much of its path as tells it from the others.

    Example:
        >>> distinct([Path("a/out"), Path("b/out")])
        ['a/out', 'b/out']
        >>> distinct([Path("runs/small"), Path("runs/large")])
        ['small', 'large']
    """
    whole = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(set(whole)):
            break
    # The same folder given twice is two lines in one place; its number tells them apart.
    counts: dict[str, int] = {}
    for at, name in enumerate(names):
        counts[name] = counts.get(name, 0) + 1
        names[at] = name if counts[name] == 1 else f"{name} ({counts[name]})"
    return names


def charts(runs: Sequence[RunRecord]) -> list[Chart | None]:
    """Curves of the same thing over each other."""

    def over(curve: Mapping[str, list[Point]]) -> list[Curve]:
        return [Curve(run.name, curve[run.name], style=at) for at, run in enumerate(runs)]

    means = {run.name: run.curve("loss_mean") or running_mean(run.curve("loss")) for run in runs}
    found = [draw("loss", "Training loss", "mean of the last 10 log lines, by step", over(means))]
    names = dict.fromkeys(name for run in runs for name in run.sets)
    for number, name in enumerate(names):
        kept = any(name in run.retention for run in runs)
        found.append(
            draw(
                *(
                    f"set{number}",
                    f"{'Retention' if kept else 'Held-out'} loss: {name}",
                    "nats per target, by step",
                ),
                over({run.name: run.set_curve(name) for run in runs}),
                note="Flat is good; higher than at step 0 is forgotten." if kept else "",
                least=0.2 if kept else 0.0,
            )
        )
        relies = over({run.name: run.set_curve(name, "reliance") for run in runs})
        found.append(reliance_chart(f"reliance{number}", f"{QUESTION} {name}", relies))
    for key, title, unit in (
        ("targets_per_second", "Targets a second", "all processes of a run together, by step"),
        ("peak_memory_gib", "Most memory so far", "GiB, by step"),
        ("learning_rate", "Learning rate", "by step"),
        ("grad_norm", "Gradient norm", "before clipping, by step"),
    ):
        found.append(draw(key, title, unit, over({run.name: run.curve(key) for run in runs}), from_zero=True))
    return found


def results(runs: Sequence[RunRecord]) -> Sheet:
    """Results, a column a run."""
    names = dict.fromkeys(name for run in runs for name in run.sets)
    rows = [
        ("state", [state_of(run).word for run in runs]),
        ("steps", [f"{run.steps:,}" for run in runs]),
        ("time", [_time(run) for run in runs]),
        ("training loss", [arrow(*ends) if (ends := training_ends(run)) else _NONE for run in runs]),
    ]
    for name in names:
        kept = any(name in run.retention for run in runs)
        rows.append((f"{'retention' if kept else 'held-out'}: {name}", [_ends(run, name) for run in runs]))
        cells = [_ends(run, name, "reliance") for run in runs]
        rows += [(f"reliance on images: {name}", cells)] if any(cell != _NONE for cell in cells) else []
    for key, label in (("shuffled", "other images cost"), ("blank", "blank images cost")):
        for name in dict.fromkeys(name for run in runs for name in run.results if name not in run.retention):
            cells = [_cost(run.results.get(name, {}), key) for run in runs]
            rows += [(f"{label}: {name}", cells)] if any(cell != _NONE for cell in cells) else []
    rows.append(("targets a second", [_median(run, "targets_per_second", "{:,.0f}") for run in runs]))
    rows.append(("waiting for data", [_median(run, "data_wait", "{:.0%}") for run in runs]))
    rows.append(("most memory", [_most(run) for run in runs]))
    caption = (
        "Losses, and what blank images cost (reliance), in nats per target, from and to; targets a second "
        "and waiting are medians."
    )
    return Sheet("results", [run.name for run in runs], rows, caption)


def _time(run: RunRecord) -> str:
    seconds = as_number(run.facts.get("seconds"))
    return duration(seconds) if seconds is not None else _NONE


def _ends(run: RunRecord, name: str, number: Number = "loss") -> str:
    points = run.set_curve(name, number)
    if not points:
        return _NONE
    if len(points) == 1:
        return f"{brief(points[0][1])} at step {points[0][0]:,.0f}"
    return arrow(points[0][1], points[-1][1])


def _cost(result: Mapping[str, object], key: str) -> str:
    loss, other = as_number(result.get("loss")), as_number(result.get(f"{key}_images_loss"))
    return signed(other - loss) if loss is not None and other is not None else _NONE


def _median(run: RunRecord, key: str, form: str) -> str:
    found = median_of(run, key)
    return _NONE if found is None else form.format(found)


def _most(run: RunRecord) -> str:
    peaks = [value for _, value in run.curve("peak_memory_gib")]
    return f"{max(peaks):.3g} GiB" if peaks else _NONE


def differences(configs: Sequence[Mapping[str, object]]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs.

    Example:
        >>> differences([{"seed": 0, "lora_r": 8}, {"seed": 0, "lora_r": 16}, {"seed": 0}])
        [('lora_r', ['8', '16', '–'])]
    """
    keys = dict.fromkeys(key for config in configs for key in config if key not in _PLACES)
    return [
        (key, [yaml_text(one[key]) if key in one else _NONE for one in configs])
        for key in keys
        if any(one.get(key) != configs[0].get(key) for one in configs)
    ]


def _all_results(runs: Sequence[RunRecord]) -> dict[str, Mapping[str, object]]:
    """What was measured of held-out documents, so named that all stand on one scale."""
    return {
        f"{run.name}: {name}": one
        for run in runs
        for name, one in run.results.items()
        if name not in run.retention
    }
