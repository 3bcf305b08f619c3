"""What the scripts of this folder share: the memory of a process, one core to measure on, versions, plots."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def memory(name: str = "VmHWM", file: str = "/proc/self/status") -> int:
    """Bytes of a process, by the kernel's name for them; 0 if it has gone."""
    try:
        status = Path(file).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name)), 0)


def pin() -> None:
    """One thread, on one core."""
    import torch

    torch.set_num_threads(1)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def options(
    description: str | None, *, each: str, quick: str, repetitions: int = 5, plots: bool = True
) -> argparse.ArgumentParser:
    """The command line of a script that measures sides in turn, for it to add its own to.

    Args:
        description: Of the script.
        each: What a repetition has.
        quick: What ``--quick`` makes smaller.
        repetitions: How many there are unless asked otherwise.
        plots: Whether it draws its times.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=repetitions, help=f"Each has {each}.")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", type=Path, help="JSON with every time.")
    if plots:
        parser.add_argument("--plot", type=Path, help="A picture of the times; needs matplotlib.")
    return parser


def about() -> dict[str, str | int]:
    """Versions and the processor, for a file of results."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | int] = {"python": platform.python_version()}
    for name in ("torch", "torchvision", "transformers", "accelerate", "peft", "numpy", "pillow", "trl"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {**found, "processor": model, "cores": os.cpu_count() or 0}


def save_bars(file: Path, groups: Sequence[str], sides: Mapping[str, Sequence[float]], label: str) -> None:
    """A plot with a group of bars for each case, one of each side; says so where matplotlib is missing."""
    axes = _axes()
    if axes is None:
        return
    width = 0.8 / len(sides)
    for number, (side, values) in enumerate(sides.items()):
        places = [place + (number - (len(sides) - 1) / 2) * width for place in range(len(groups))]
        axes.bar_label(axes.bar(places, values, width, label=side), fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(groups)), [one.replace(", ", ",\n") for one in groups], fontsize=8)
    axes.set_ylabel(label)
    axes.legend()
    _save(axes, file)


def save_lines(file: Path, lines: Mapping[str, Mapping[float, float]], labels: tuple[str, str]) -> None:
    """A plot with two logarithmic axes and a line for each name; says so where matplotlib is missing."""
    axes = _axes()
    if axes is None:
        return
    for name, points in lines.items():
        axes.loglog(list(points), list(points.values()), "o-", label=name)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.legend()
    _save(axes, file)


def _save(axes: Axes, file: Path) -> None:
    metadata = {"Date": None} if file.suffix == ".svg" else None
    axes.figure.savefig(file, bbox_inches="tight", metadata=metadata)


def _axes() -> Axes | None:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("No plot is made: matplotlib is not installed.", file=sys.stderr)
        return None
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "vlcpt"})  # small, and the same again
    return Figure(figsize=(8, 4)).subplots()
