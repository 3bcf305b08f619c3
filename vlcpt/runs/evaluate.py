"""``vlcpt eval``: a checkpoint measured on held-out and retention data."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from vlcpt.config.precision import autocast_type, slow_products
from vlcpt.config.yaml import Configs
from vlcpt.errors import ConfigError
from vlcpt.file_writes import write_json
from vlcpt.model.loading import check_evaluated, load_for_evaluation, load_processor
from vlcpt.report.screen import Screen, say
from vlcpt.report.terminal import results_table
from vlcpt.runs.data import RunData, quiet_libraries, show_unmeasured, shown, with_native_model
from vlcpt.training.evaluate import EvalOptions, SetResult, evaluate_sets


def eval_run(
    configs: Configs, checkpoint: Path, output: Path | None = None, console: Console | None = None
) -> dict[str, SetResult]:
    """Measure a checkpoint on ``eval_data`` and ``retention_data``."""
    console = console or Screen()
    if not configs.data.eval_data and not configs.data.retention_data:
        raise ConfigError("eval_data and retention_data are missing: there is nothing to measure. Add one.")
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    check_evaluated(configs.model, str(checkpoint))
    sets = RunData(configs, processor, shown(console)).evaluations()
    show_unmeasured(sets, console)
    device = configs.training.device
    if (slow := slow_products(configs.training)) is not None:
        say(console, slow, "yellow")
    model, base = load_for_evaluation(with_native_model(configs).model, str(checkpoint))
    for one in (model, base):
        # 4-bit weights are put on their device while they load.
        if one is not None and not getattr(one, "is_quantized", False):
            torch.nn.Module.to(one, device)  # transformers hides the type of its own
    options = EvalOptions(
        batch_size=configs.training.per_device_eval_batch_size,
        num_workers=configs.training.dataloader_num_workers,
        timeout=configs.training.dataloader_timeout,
        autocast=autocast_type(configs.training),
        track=shown(console),
    )
    results = evaluate_sets(model, sets, processor, options, base=base)
    console.print(results_table(results))
    for name, dataset in sets.items():
        if dataset.has_media and not dataset.can_shuffle:
            say(
                console,
                f"{name}: no loss with another document's images or videos: only one document has one.",
            )
    if output:
        write_json(output, {"sets": results}, "what was measured")
        say(console, f"written to {output}")
    return results
