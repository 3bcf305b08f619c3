"""``vlcpt demo``: measure, train, measure again, on the embedded model and data."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlcpt.config.precision import autocast_type
from vlcpt.config.yaml import load_config
from vlcpt.demo import base_path, data_path
from vlcpt.errors import ConfigError
from vlcpt.file_writes import Writing, write_json
from vlcpt.folder_locks import LOCK, hold
from vlcpt.model.loading import load_model, load_processor
from vlcpt.report.numbers import number
from vlcpt.report.screen import Screen, plain_table, say, visible
from vlcpt.run_files import read_mapping
from vlcpt.runs.data import RunData, quiet_libraries, shown
from vlcpt.runs.train import train_run
from vlcpt.training.evaluate import EvalOptions, evaluate_sets
from vlcpt.training.scores import SetResult, perplexity

Results = dict[str, SetResult]


def run_demo(output_dir: Path, *, overwrite: bool = False, console: Console | None = None) -> None:
    """Run the main job from start to end; writes a run's standard folder, its inputs and ``demo.json``.

    Args:
        output_dir: Must be empty or not exist, but for ``overwrite``.

    Raises:
        ConfigError: If the folder holds something, or another process writes into it.
    """
    console = console or Screen()
    with hold(output_dir):
        _run_demo(output_dir, console, overwrite=overwrite)


def _run_demo(output_dir: Path, console: Console, *, overwrite: bool) -> None:
    started = time.monotonic()
    config = copy_inputs(output_dir, overwrite=overwrite)
    console.print(
        "A small Qwen2.5-VL reads rows of handwritten digits aloud in English (the old domain). It now goes "
        "on with Chinese documents about the same digits and about photographs (the new domain), while 35% "
        "of its targets are replayed from the old one.\n"
    )
    quiet_libraries()
    configs = load_config(config, ["--overwrite", "--output_dir", str(output_dir)])
    processor = load_processor(configs.model.model_name_or_path)
    sets = RunData(configs, processor).evaluations()
    # As training computes, before it and after.
    options = EvalOptions(autocast=autocast_type(configs.training), track=shown(console))
    # A new adapter adds zero, so this is the base.
    untrained = torch.nn.Module.to(load_model(configs.model), configs.training.device)
    before = evaluate_sets(untrained, sets, processor, options, with_base=False)
    trainer = train_run(configs, console)
    assert trainer.model is not None
    after = read_mapping(output_dir / "eval.json")["sets"]  # what the run has measured at its end
    assert isinstance(after, dict)
    seconds = round(time.monotonic() - started, 1)
    write_json(
        output_dir / "demo.json",
        {"before": {"sets": before}, "after": {"sets": after}, "seconds": seconds},
        "what was measured",
    )
    total = trainer.train_dataset.ledger.total  # type: ignore[union-attr]
    console.print(comparison(before, after))
    say(
        console,
        f"{total.documents['used']:,} documents, {total.tokens['targets']:,} targets a pass, "
        f"{trainer.state.global_step:,} steps, {seconds:.0f} s in all. "
        f"The numbers are in {output_dir / 'demo.json'}.",
        is_result=True,
    )
    console.print()
    console.print(
        "Your own data next. Look at rows, edit a copy of the configuration, check, inspect, train:"
    )
    for line in own_commands(output_dir / "inputs"):
        console.print(Text(f"  {visible(line)}"), soft_wrap=True)


def own_commands(inputs: Path) -> list[str]:
    """What a person types to go on with data of their own.

    Example:
        >>> print("\\n".join(own_commands(Path("vlcpt-demo/inputs"))))
        head -n 3 vlcpt-demo/inputs/data/new_train.jsonl
        cp vlcpt-demo/inputs/demo.yaml vlcpt-demo/inputs/my.yaml
        vlcpt check vlcpt-demo/inputs/my.yaml
        vlcpt inspect vlcpt-demo/inputs/my.yaml --rows 0:3
        vlcpt train vlcpt-demo/inputs/my.yaml
    """
    # Beside the demo's own, because the paths in it start at its folder.
    copy = shlex.quote(str(inputs / "my.yaml"))
    return [
        f"head -n 3 {shlex.quote(str(inputs / 'data' / 'new_train.jsonl'))}",
        f"cp {shlex.quote(str(inputs / 'demo.yaml'))} {copy}",
        f"vlcpt check {copy}",
        f"vlcpt inspect {copy} --rows 0:3",
        f"vlcpt train {copy}",
    ]


def copy_inputs(output_dir: Path, *, overwrite: bool) -> Path:
    """Copy model, data and configuration to ``output_dir/inputs``, for a person to look at and change.

    Returns:
        The configuration's path.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"output_dir {output_dir} is a file. Give a folder.")
    # A person may have changed the inputs of a demo that failed, so they are replaced only if asked for.
    if output_dir.exists() and any(one.name != LOCK for one in output_dir.iterdir()) and not overwrite:
        raise ConfigError(
            f"output_dir {output_dir} is not empty. Give another one with --output_dir, "
            "or replace what is there with --overwrite."
        )
    inputs = output_dir / "inputs"
    if inputs.exists() and not (inputs / "demo.yaml").is_file():
        raise ConfigError(f"{inputs} is no earlier demo's. Give another folder with --output_dir.")
    shutil.rmtree(inputs, ignore_errors=True)
    sources = {"base": Path(base_path()), "data": Path(data_path())}
    needed = sum(one.stat().st_size for folder in sources.values() for one in folder.rglob("*"))
    with Writing(inputs, "the demo's model and data", needed=needed):
        try:
            for name, folder in sources.items():
                shutil.copytree(folder, inputs / name)
            return Path(shutil.copy(Path(base_path()).parent / "demo.yaml", inputs / "demo.yaml"))
        except OSError:
            shutil.rmtree(inputs, ignore_errors=True)  # half of them would be taken for somebody's own
            raise


def comparison(before: Results, after: Results) -> Table:
    """Perplexity per target on held-out documents, before and after."""
    table = plain_table("held-out documents, perplexity per target")
    for name in ("", "before", "after", "change"):
        table.add_column(name, justify="left" if not name else "right")
    rows: list[tuple[str, float | None, float | None]] = []
    for name, label in (("new", "new domain"), ("old", "old domain")):
        for key, seen in (
            ("loss", "right image"),
            ("shuffled_images_loss", "another document's"),
            ("blank_images_loss", "blank"),
        ):
            rows.append((f"{label}, {seen}", before[name][key], after[name][key]))  # type: ignore[literal-required]
    for label, first, last in rows:
        if first is None or last is None:
            continue
        change = perplexity(last - first)
        shown = f"÷ {number(1 / change)}" if change < 0.5 else f"{change - 1:+.1%}"
        table.add_row(label, number(perplexity(first)), number(perplexity(last)), shown)
    return table
