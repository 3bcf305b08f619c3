"""The data of a run from its configuration: what is read, with which options, and how that is shown."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import torch
from rich.console import Console
from transformers import ProcessorMixin

from vlcpt.config.precision import used_devices
from vlcpt.config.schema import DataConfig
from vlcpt.config.yaml import Configs
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encode.vision import EncodingOptions, MediaCheck
from vlcpt.data.media.open import MediaLimits
from vlcpt.data.plan.ledger import Ledger, list_reasons
from vlcpt.data.plan.plan import MAX_BAD_IN_A_ROW, Track, untracked
from vlcpt.data.rows.open import SourceConfig
from vlcpt.data.sources import members_of, require_distinct
from vlcpt.model.loading import with_native_dtype
from vlcpt.report.check import unread_lines
from vlcpt.report.screen import say, tracked


@dataclass(frozen=True)
class RunData:
    """The data sets of a run, planned when asked for.

    Args:
        configs: What is read, and how.
        processor: The model's.
        track: Shows how far reading has come.
        plans: Folder where plans are shared and kept.
        check: What is read of media; of more than headers, all data are looked at, however much is bad.
    """

    configs: Configs
    processor: ProcessorMixin
    track: Track = untracked
    plans: Path | None = None
    check: MediaCheck = "header"

    def train(self) -> CPTDataset:
        """The training data."""
        data = self.configs.data
        return self._planned(
            "train",
            data.train_data,
            replay_data=data.replay_data,
            replay_share=data.replay_share,
        )

    def evaluations(self) -> dict[str, CPTDataset]:
        """Held-out and retention data, each source a set of its own."""
        return {entry.name: self.evaluation(entry) for entry in evaluation_entries(self.configs.data)}

    def evaluation(self, entry: SourceConfig) -> CPTDataset:
        """One source of held-out or retention data; of many documents, those that are drawn."""
        drawn = self.configs.data.eval_max_documents
        return self._planned(f"eval-{quote(entry.name, safe='')}", [entry], max_documents=drawn)

    def _planned(self, name: str, entries: Sequence[SourceConfig], **mixing: object) -> CPTDataset:
        data, training = self.configs.data, self.configs.training
        return CPTDataset(
            entries,
            self.processor,
            cache_dir=self.plans and self.plans / name,
            seed=training.data_seed if training.data_seed is not None else training.seed,
            track=self.track,
            max_length=training.max_length,
            packing=training.packing,
            untagged=data.untagged,
            max_row_bytes=data.max_row_bytes,
            on_overlong=data.on_overlong,
            on_bad_data=data.on_bad_data,
            max_bad_fraction=data.max_bad_fraction,
            max_bad_in_a_row=MAX_BAD_IN_A_ROW if self.check == "header" else None,
            num_proc=training.workers,
            timeout=training.dataloader_timeout,
            **vars(replace(encoding_options(data), media_check=self.check)),
            **mixing,  # type: ignore[arg-type]
        )


def evaluation_entries(data: DataConfig) -> list[SourceConfig]:
    """The sources of held-out and retention data; of a prepared set, each of its own.

    Raises:
        DocumentError: If two have one name.
    """
    found = [
        member
        for role in ("eval_data", "retention_data")
        for entry in getattr(data, role)
        for member in members_of(entry, role)
    ]
    require_distinct([entry.name for entry in found])
    return found


def retention_names(data: DataConfig) -> tuple[str, ...]:
    """The names of the sets that hold what the model knew before."""
    return tuple(
        member.name for entry in data.retention_data for member in members_of(entry, "retention_data")
    )


def shown(console: Console) -> Track:
    """A bar with the time left, gone when done; nothing where there is no terminal."""
    if not console.is_terminal:
        return untracked
    return partial(tracked, console=console)


def encoding_options(data: DataConfig) -> EncodingOptions:
    """How the configuration wants documents to be encoded."""
    limits = MediaLimits(
        data.max_file_bytes, data.max_image_pixels, data.max_video_frames, data.max_video_pixels
    )
    return EncodingOptions(
        data.train_eos, data.min_pixels, data.max_pixels, data.fps, data.max_frames, limits
    )


def show_unread(ledger: Ledger, console: Console) -> None:
    """Print what of each source was not read."""
    for line in unread_lines(ledger):
        say(console, line)


def show_unmeasured(sets: Mapping[str, CPTDataset], console: Console) -> None:
    """Print which documents of each evaluation set are not measured, and what was not read."""
    for name, dataset in sets.items():
        total = dataset.ledger.total
        if total.documents["not_drawn"]:
            usable = total.documents["used"] + total.documents["not_drawn"]
            drawn = f"{total.documents['used']:,} of {usable:,} documents are measured, drawn by seed"
            say(console, f"{name}: {drawn} (eval_max_documents).")
        if total.dropped_documents:
            reasons = list_reasons(dict(sorted(total.dropped_documents.items())))
            count = f"{total.dropped_documents.total()} of {total.documents['read']}"
            say(console, f"{name}: {count} documents are not measured ({reasons}):")
        for one in dataset.ledger.dropped[:5]:
            say(console, f"  {one.source}:{one.line}: {one.detail}")
        show_unread(dataset.ledger, console)


def with_native_model(configs: Configs) -> Configs:
    """The same, with frozen weights in a type that the run's GPUs compute in."""
    emulates = used_devices(configs.training).emulates_bf16
    return replace(configs, model=with_native_dtype(configs.model, emulates_bf16=emulates))


def _is_no_mismatch(record: logging.LogRecord) -> bool:
    # Trainer accumulates itself and tells DeepSpeed alone, so that accelerate has 1 in every such run.
    return "Gradient accumulation steps mismatch" not in record.getMessage()


def quiet_libraries() -> None:
    """Let transformers show no bars: a run has its own. And DeepSpeed search for no GPU where none is."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # Each barrier says that it takes the GPU of its process, which is the right one.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    logging.getLogger("accelerate.accelerator").addFilter(_is_no_mismatch)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
