"""Fills a ``vision_cache`` ahead of training, on one process or on many."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

from rich.console import Console
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlcpt.config.precision import autocast_type
from vlcpt.config.training import CPTConfig
from vlcpt.config.yaml import Configs
from vlcpt.data.collator import Batch, CPTDataCollator
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encode.features import FeatureStore, sweep
from vlcpt.data.workers import Workers
from vlcpt.model.loading import load_base, load_processor
from vlcpt.model.patch_embedding import choose_form, embed_patches
from vlcpt.model.tuning import finish_tuning
from vlcpt.model.vision_cache import with_features
from vlcpt.report.screen import say
from vlcpt.runs.data import RunData, quiet_libraries, shown, with_native_model
from vlcpt.training.features import run_store, stored_type
from vlcpt.training.guards import converted_type
from vlcpt.training.step import leave_out_failed, sent, watched


def fill_cache(configs: Configs, console: Console) -> FeatureStore:
    """Compute the features that a run of this configuration would, of all its media, and keep them.

    Processes that a launcher started share the packs of the data; each reads the rows for itself. What is
    kept already stays, so an interrupted run continues where it stopped.

    Raises:
        WriteError: If features cannot be written.
        ValueError: If the data failed.
    """
    quiet_libraries()
    processor = load_processor(configs.model.model_name_or_path)
    data = RunData(configs, processor, shown(console))
    return fill_sets(configs, {"the training data": data.train(), **data.evaluations()}, processor, console)


def fill_sets(
    configs: Configs, sets: Mapping[str, CPTDataset], processor: ProcessorMixin, console: Console
) -> FeatureStore:
    """The same for data sets that are open already, by name.

    Raises:
        WriteError: If features cannot be written.
        ValueError: If the data failed.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    model = _towers(with_native_model(configs))
    store = run_store(model, configs.training)
    if rank == 0:
        sweep(store.folder)
    # As DeepSpeed does in training, so that the features are those of their key.
    model.model.visual.to(configs.training.device, converted_type(configs.training))
    _choose_patch_embedding(model, configs.training, console)
    done: Counter[bool] = Counter()
    for name, dataset in sets.items():
        dataset.keeps_bytes = configs.training.pixel_bytes
        dataset.use_features(store)
        mine = [index for index, size in enumerate(dataset.pack_sizes()) if size[2]][rank::ranks]
        done += _fill(model, dataset, mine, processor, configs.training, console, f"vision_cache, {name}")
    if rank == 0:
        share = f" ({ranks} processes; of this one)" if ranks > 1 else ""
        kind = stored_type(next(model.model.visual.parameters()).dtype, configs.training)
        say(
            console,
            f"vision_cache: {done[False]:,} media computed, {done[True]:,} were there{share}, in "
            f"{str(kind).removeprefix('torch.')}. To train from them, write in the configuration:",
        )
        say(console, f"vision_cache: {store.folder}", is_result=True)
    return store


def _choose_patch_embedding(model: PreTrainedModel, training: CPTConfig, console: Console) -> None:
    """Embed patches as a run on this device would."""
    dtype = autocast_type(training) or next(model.model.visual.parameters()).dtype
    found = choose_form(model, training.patch_embedding, training.device, dtype)
    embed_patches(model, found.form)
    if found.reason:
        say(console, found.reason)


def _towers(configs: Configs) -> PreTrainedModel:
    """The model, of which vision tower and merger compute what they compute in training."""
    # ZeRO-3 would partition what is loaded while its configuration lives; here each process has all of it.
    unset_hf_deepspeed_config()
    asked = configs.model
    model = load_base(
        asked.model_name_or_path, dtype=asked.dtype, attn_implementation=asked.attn_implementation
    )
    tuned = finish_tuning(model.requires_grad_(False).eval())
    assert isinstance(tuned, PreTrainedModel)
    return tuned


def _fill(
    model: PreTrainedModel,
    dataset: CPTDataset,
    items: list[int],
    processor: ProcessorMixin,
    training: CPTConfig,
    console: Console,
    description: str,
) -> Counter[bool]:
    """Keep the features of some items of a data set; how many media were there, and how many were not."""
    collator = CPTDataCollator(processor)
    collator.keeps_bytes = training.pixel_bytes
    collator.window_size = model.config.vision_config.window_size
    loader: DataLoader[Batch] = DataLoader(
        dataset,  # type: ignore[arg-type]  # of items; the collator makes batches
        training.per_device_train_batch_size,
        sampler=items,
        collate_fn=collator,
        num_workers=training.workers,
    )
    done: Counter[bool] = Counter()
    with Workers(training.dataloader_timeout, lambda: watched(dataset)) as workers:
        for batch in shown(console)(workers.awaited(loader), description):
            leave_out_failed(batch, dataset)
            dataset.failures.check()  # of this process: they do not wait for each other
            media = batch.get("media", [])
            assert isinstance(media, list)
            done.update(one.is_kept for one in media)
            with_features(model, sent(batch, training.device, collator.scales), must_keep=True)
    return done
