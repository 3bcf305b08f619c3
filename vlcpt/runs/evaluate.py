"""``vlcpt eval``: a checkpoint measured on held-out and retention data."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from torch import nn
from transformers import ProcessorMixin

from vlcpt.config.precision import autocast_type, slow_products
from vlcpt.config.training import CPTConfig
from vlcpt.config.yaml import Configs
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.plan.plan import Track
from vlcpt.errors import ConfigError
from vlcpt.file_writes import write_json
from vlcpt.model.loading import check_evaluated, load_for_evaluation, load_processor
from vlcpt.model.patch_embedding import choose_form, embed_patches
from vlcpt.model.tuning import base_model
from vlcpt.report.screen import Screen, say
from vlcpt.report.terminal import results_table
from vlcpt.runs.data import RunData, quiet_libraries, show_unmeasured, shown, with_native_model
from vlcpt.training.evaluate import EvalOptions, SetResult, evaluate_sets
from vlcpt.training.ranks import RankWatch, first_rank_only, require_equal, together

T = TypeVar("T")


def eval_run(
    configs: Configs, checkpoint: Path, output: Path | None = None, console: Console | None = None
) -> dict[str, SetResult]:
    """Measure a checkpoint on ``eval_data`` and ``retention_data``.

    Under a launcher all ranks measure their share, each with the whole model, and get all numbers; the first
    one alone writes and prints.
    """
    if not configs.data.eval_data and not configs.data.retention_data:
        raise ConfigError("eval_data and retention_data are missing: there is nothing to measure. Add one.")
    training = configs.training
    is_main = training.process_index == 0
    console = (console or Screen()) if is_main else Console(quiet=True)
    watch = RankWatch(training)
    with watch.watched():
        sets, results = _measure(configs, checkpoint, console, watch)

        def write() -> None:
            if output and is_main:
                write_json(output, {"sets": results}, "what was measured")

        console.print(results_table(results))
        together(write)
    for name, dataset in sets.items():
        if count := len(dataset.failures):
            say(console, f"{name}: {count} documents could not be read, and are not measured.", "yellow")
        if dataset.has_media and not dataset.can_shuffle:
            say(
                console,
                f"{name}: no loss with another document's images or videos: only one document has one.",
            )
    if output:
        say(console, f"written to {output}")
    return results


def _measure(
    configs: Configs, checkpoint: Path, console: Console, watch: RankWatch
) -> tuple[dict[str, CPTDataset], dict[str, SetResult]]:
    """The sets, and what each of them gave."""
    training = configs.training
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    check_evaluated(configs.model, str(checkpoint))
    watch.at(0, "reading the data")
    sets = _read_sets(configs, processor, console)
    show_unmeasured(sets, console)
    if (slow := slow_products(training)) is not None:
        say(console, slow, "yellow")
    watch.at(0, "loading the model")
    loaded: list[tuple[nn.Module, nn.Module | None]] = []
    together(lambda: loaded.append(_load(configs, checkpoint)))
    ((model, base),) = loaded
    dtype = autocast_type(training) or base_model(model).lm_head.weight.dtype
    # One choice for both models and all ranks: rounding is another in the other form.
    patches = first_rank_only(
        training, lambda: choose_form(model, training.patch_embedding, training.device, dtype)
    )
    for one in filter(None, (model, base)):
        embed_patches(one, patches.form)
    if patches.reason:
        say(console, patches.reason)
    options = EvalOptions(
        batch_size=training.per_device_eval_batch_size,
        num_workers=training.workers,
        timeout=training.dataloader_timeout,
        autocast=autocast_type(training),
        loss_chunk=training.loss_chunk,
        track=_reported(shown(console), watch),
        rank=training.process_index,
        ranks=training.world_size,
    )
    return sets, evaluate_sets(model, sets, processor, options, base=base)


def _read_sets(configs: Configs, processor: ProcessorMixin, console: Console) -> dict[str, CPTDataset]:
    """The sets, planned by one rank of each machine for all of its own.

    Raises:
        ValueError: If ranks have not found the same.
    """
    training = configs.training
    if training.world_size == 1:
        return RunData(configs, processor, shown(console)).evaluations()
    sets: dict[str, CPTDataset] = {}
    # A folder that no run has: output_dir may be that of one that goes on.
    token = first_rank_only(training, lambda: secrets.token_hex(16))
    plans = Path(tempfile.gettempdir(), f"vlcpt-{token}")
    try:
        together(lambda: sets.update(RunData(configs, processor, shown(console), plans).evaluations()))
    finally:
        shutil.rmtree(plans, ignore_errors=True)
    for name, one in sets.items():
        require_equal(one.digest, f"the plan of {name}")
    return sets


def _load(configs: Configs, checkpoint: Path) -> tuple[nn.Module, nn.Module | None]:
    """The model and, where that is another one, its base, on this rank's device."""
    _forget_sharding(configs.training)
    model, base = load_for_evaluation(with_native_model(configs).model, str(checkpoint))
    for one in (model, base):
        # 4-bit weights are put on their device while they load.
        if one is not None and not getattr(one, "is_quantized", False):
            nn.Module.to(one, configs.training.device)  # transformers hides the type of its own
    return model, base


def _forget_sharding(training: CPTConfig) -> None:
    """Let models load whole, also where the run that is measured trains with DeepSpeed.

    Its configuration, once made, has transformers partition each model that is loaded (ZeRO-3), and only an
    engine could put that together again.
    """
    if training.deepspeed is not None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _reported(track: Track, watch: RankWatch) -> Track:
    """What shows the progress, each batch of it a sign of life to the other ranks."""

    def tracked(sequence: Iterable[T], description: str) -> Iterator[T]:
        for one in track(sequence, description):
            watch.at(0, description)
            yield one

    return tracked
