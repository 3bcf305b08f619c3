"""What doctor examines: the run's model, settings and engine, on documents of its own."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlcpt.config.precision import autocast_type
from vlcpt.config.schema import ModelConfig
from vlcpt.config.training import CPTConfig, make_training
from vlcpt.config.yaml import EarlyConfig
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.encode.encoder import Sample, scaled_sample
from vlcpt.data.encode.pixels import pixel_scales
from vlcpt.model.loading import load_model
from vlcpt.report.screen import Screen
from vlcpt.runs.data import encoding_options
from vlcpt.runs.doctor.base import Base
from vlcpt.runs.doctor.documents import Row, documents
from vlcpt.training.trainer import CPTTrainer

if TYPE_CHECKING:
    from torch.utils.data import Dataset

# Keys of the run that say when something is saved, shown, measured or ended, and not how a step is computed.
_OWN = (
    *(
        "save_",
        "eval_",
        "logging_",
        "log_",
        "hub_",
        "push_",
        "load_best",
        "metric_for",
        "greater_is",
        "run_name",
    ),
    *("report_to", "resume_from", "overwrite", "num_train_epochs", "max_steps", "warmup", "lr_scheduler"),
    *("output_dir", "per_device_eval", "disable_tqdm", "do_", "prediction_loss", "batch_eval", "skip_memory"),
)
_TIMEOUT = 300  # seconds in which a rank must come, unless the run has fewer


@dataclass
class Subject:
    """The run as doctor examines it.

    Args:
        early: Its configuration, from which settings are made again with some of them changed.
        training: Its settings.
        config: Its model, with the base that stands for its own.
        base: That base.
        processor: The model's.
        folder: For runs and checkpoints; deleted afterwards.
        quick: Whether it should take two minutes only.
        notes: Facts that the report has beside the lines.
    """

    early: EarlyConfig
    training: CPTConfig
    config: ModelConfig
    base: Base
    processor: ProcessorMixin
    folder: Path
    quick: bool
    notes: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of this rank."""
        return self.training.device

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return int(self.training.world_size)

    @property
    def autocast(self) -> torch.dtype | None:
        """The type of products; None for that of the weights."""
        return autocast_type(self.training)

    @property
    def rows_of_batch(self) -> int:
        """The batch size of the run, and two where it has one: rows are kept apart too."""
        return max(2, self.training.per_device_train_batch_size)

    def settings(self, name: str, **changes: object) -> CPTConfig:
        """The run's settings for a training of doctor's own, which shows and saves nothing by itself."""
        kept = {key: value for key, value in self.early.training.items() if not key.startswith(_OWN)}
        forget_engine()
        timeout = min(_TIMEOUT, int(self.training.ddp_timeout))
        own: dict[str, object] = {
            "output_dir": str(self.folder / name),
            "report_to": "none",
            "save_strategy": "no",
            "eval_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 1,
            "ddp_timeout": timeout,
            "dataloader_timeout": timeout,
            # What is examined is computed, and nobody's folder is written to.
            "vision_cache": None,
            "vision_cache_dtype": "auto",
        }
        if self.device.type == "cpu":
            own["dataloader_pin_memory"] = False  # torch would warn for each loader
        return make_training(
            {**kept, **own, **changes}, replace(self.early.data, eval_data=(), retention_data=())
        )

    def model(self, **changes: object) -> PreTrainedModel | PeftModel:
        """The model as the run loads it, with some keys changed, and adapters that are not zero."""
        model = load_model(replace(self.config, **changes), seed=self.training.seed)  # type: ignore[arg-type]
        _nudge(model)
        return model

    def placed(self, **changes: object) -> PreTrainedModel | PeftModel:
        """A model on this rank's device, without an engine."""
        forget_engine()
        model = self.model(lora_dropout=0.0, **changes)
        if not getattr(model, "is_quantized", False):  # 4-bit weights are put there while they load
            torch.nn.Module.to(model, self.device)
        return model

    def trainer(
        self,
        args: CPTConfig,
        dataset: Dataset[object],
        callbacks: Sequence[TrainerCallback] = (),
        change: Callable[[torch.nn.Module], None] | None = None,
        **changes: object,
    ) -> CPTTrainer:
        """A trainer of the run; ``args`` are made before, because ZeRO-3 partitions what is loaded after."""
        model = self.model(**changes)
        if change is not None:
            change(model)
        return CPTTrainer(
            model,
            args,
            train_dataset=dataset,
            processing_class=self.processor,
            callbacks=list(callbacks),
            console=Screen(file=StringIO()),
        )

    def dataset(self, rows: Sequence[Row], max_length: int, *, packing: bool) -> CPTDataset:
        """Documents in packs, or each an item, encoded as the run's."""
        options = encoding_options(self.early.data)
        return CPTDataset(
            list(rows),
            self.processor,
            max_length=max_length,
            packing=packing,
            on_overlong="split",
            seed=self.training.seed,
            **vars(options),
        )

    @cached_property
    def packs(self) -> CPTDataset:
        """At least four packs of several documents for each rank, and as many as a batch has rows."""
        count = max(4 * self.ranks, self.rows_of_batch)
        rows = documents(5 * count)
        sizes = self.dataset(rows, 2**20, packing=False).pack_sizes()[:, 0]
        return self.dataset(rows, max(int(sizes.max()), int(sizes.sum()) // count), packing=True)

    @cached_property
    def singles(self) -> CPTDataset:
        """Documents that are items of their own: eight, and the same number for each rank."""
        count = self.ranks * -(-8 // self.ranks)
        return self.dataset(documents(count), 2**20, packing=False)

    def samples(self, dataset: CPTDataset) -> list[Sample]:
        """All samples of a data set, in the order of its items."""
        return [one for number in range(len(dataset)) for one in dataset[number] if isinstance(one, Sample)]

    def with_pixels(self, samples: Sequence[Sample]) -> list[Sample]:
        """The same with pixels as the processor gives them: those of training are bytes."""
        scales = pixel_scales(self.processor)
        return [scaled_sample(one, scales) for one in samples]


def forget_engine() -> None:
    """Let the next model be loaded unpartitioned, and the next settings choose another engine.

    transformers and accelerate remember DeepSpeed for the process, and partition each model that is loaded.
    """
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def _nudge(model: PreTrainedModel | PeftModel) -> None:
    """Give new adapters values: they are zero, so they add nothing, and half of their gradients are zero."""
    generator = torch.Generator().manual_seed(0)
    for name, one in model.named_parameters():
        if one.requires_grad and ".lora_B." in name and not hasattr(one, "ds_id"):
            values = torch.randn(one.shape, generator=generator) * 0.02
            one.data.copy_(values)


def release() -> None:
    """Free the memory of models that are no longer used: their modules refer to each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
