"""CPTTrainer: transformers' Trainer, with the loss, the resume and the evaluation of this library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from vlcpt.config.schema import LEARNING_RATES
from vlcpt.config.training import CPTConfig
from vlcpt.data.collator import Batch, CPTDataCollator
from vlcpt.data.dataset import CPTDataset
from vlcpt.data.workers import Workers, end_persistent_workers
from vlcpt.errors import ConfigError
from vlcpt.interrupts import Interruption, signal_of
from vlcpt.model.tuning import base_model, parameter_groups
from vlcpt.training.blank_images import measures_blank, sets_of, sums_with_blank
from vlcpt.training.checkpoints.callback import Checkpoints
from vlcpt.training.checkpoints.resume import StepSeeds
from vlcpt.training.checkpoints.upstream import count_lost_step, forget_evaluation_loaders, quiet_partial_load
from vlcpt.training.evaluate import row_sums, trainer_metrics
from vlcpt.training.features import keep_features
from vlcpt.training.guards import EngineCheck, FiniteNumbers, check_run, require_bounds
from vlcpt.training.loss import target_losses
from vlcpt.training.order import PackOrder, require_packs
from vlcpt.training.progress import RunProgress
from vlcpt.training.ranks import HostSums, RankWatch
from vlcpt.training.source_losses import SourceLosses
from vlcpt.training.step import (
    count_step,
    leave_out_failed,
    note_failed,
    read_step,
    reading,
    require_failed,
    require_few_failed,
    require_fillers,
    sent,
    set_up_collator,
    take_documents,
    watched,
)


class CPTTrainer(Trainer):
    """Trains a Qwen2.5-VL on documents.

    The loss of an optimizer step is Σ weight · nll / Σ weight over all its targets, whatever the
    batch size, accumulation, packing or number of ranks.

    Args:
        model: As :func:`vlcpt.load_model` gives it.
        args: The training configuration.
        train_dataset: Items for the collator, e.g. a :class:`vlcpt.CPTDataset`.
        eval_dataset: One data set, or several by name.
        data_collator: Default: :class:`vlcpt.CPTDataCollator`.
        processing_class: The processor; saved with each checkpoint.
        callbacks: More of them.
        console: Where progress is shown.

    Raises:
        ValueError: For a way of running that would give wrong results.

    Example:
        See the README; ``tests/test_readme.py`` runs it.
    """

    args: CPTConfig
    model: PreTrainedModel | PeftModel

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: CPTConfig,
        train_dataset: Dataset[object] | None = None,
        eval_dataset: Dataset[object] | Mapping[str, Dataset[object]] | None = None,
        data_collator: object | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        console: Console | None = None,
    ) -> None:
        if eval_dataset is None and args.chooses_evaluation:
            args.eval_on_start = args.eval_on_end = False
        args.dataloader_pin_memory &= args.device.type != "cpu"  # torch would warn for each loader
        check_run(model, args)
        require_packs(args, train_dataset)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("CPTTrainer needs processing_class (the processor), or a data_collator.")
            data_collator = CPTDataCollator(processing_class)
        base = base_model(model)
        # Trainer turns off only the outer one; the text model reads its own, and a cache lets the
        # documents of a pack see each other.
        base.config.get_text_config().use_cache = False
        given = [one for one in (train_dataset, *sets_of(eval_dataset, args)) if one is not None]
        keeps = keep_features(model, args, given)
        if keeps and not isinstance(data_collator, CPTDataCollator):
            raise ConfigError("vision_cache needs a CPTDataCollator: no other knows features. Remove one.")
        set_up_collator(data_collator, model, args, given, keeps_features=keeps)
        self.progress = RunProgress(args.max_length if args.packing else None, console, args.device)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=trainer_metrics,
            callbacks=[*(callbacks or []), self.progress, StepSeeds()],
        )
        self.loss_is_scaled_for_ga = True
        # accelerate's sampler would take its seed from torch, which StepSeeds moves: a second train() would
        # read another order, and each rank its own.
        self.accelerator.dataloader_config.data_seed = args.seed if args.data_seed is None else args.data_seed
        for upstream in (ProgressCallback, PrinterCallback):  # would write beside the progress of this run
            self.remove_callback(upstream)
        self._evaluated: object = None
        self._evaluates_start = bool(args.eval_on_start)
        self._interruption = Interruption()
        self._workers = Workers(args.dataloader_timeout, lambda: watched(self.train_dataset, self._evaluated))
        self._finite = FiniteNumbers(self)
        self._ranks = RankWatch(args, lambda: reading(self.train_dataset))
        self._sums = HostSums(args)
        names = [*train_dataset.source_rows] if isinstance(train_dataset, CPTDataset) else []
        self._source_losses = SourceLosses(names, args.device)
        self._order = PackOrder(model, args)
        self._checkpoints = Checkpoints(self, self.args, self.model, self.progress, self._order)
        for callback in (EngineCheck(self, self.progress), self._finite, self._ranks, self._checkpoints):
            self.add_callback(callback)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the start or a checkpoint; that, and the best one at the end, load every tensor.

        Args:
            resume_from_checkpoint: As in the configuration: True is the newest that verifies.
            trial, ignore_keys_for_eval: As for ``Trainer.train``.

        Raises:
            ConfigError: If another process trains in output_dir.
            CheckpointError: If the checkpoint cannot be used.
            WriteError: If a checkpoint cannot be written.
            NotFiniteError: If a loss or a gradient is not finite; the step is not saved.
            SystemExit, KeyboardInterrupt: After SIGTERM (143) or SIGINT, when a checkpoint is saved.
        """
        forget_evaluation_loaders(self)  # after an error their workers are gone
        with self._ranks.watched(), self._checkpoints.held():
            self._sums.connect()
            checkpoint = self._checkpoints.resume(resume_from_checkpoint)
            # The run that is resumed has done so already.
            self.args.eval_on_start = self._evaluates_start and checkpoint is None
            with (
                quiet_partial_load(),
                self._workers,
                self.progress,
                self._interruption.caught(),
                self._checkpoints.kept(),
            ):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
            for loader in (self.callback_handler.train_dataloader, *forget_evaluation_loaders(self)):
                end_persistent_workers(loader)
            self._checkpoints.restore_best()
        return output

    def _get_train_sampler(self, train_dataset: Dataset[object] | None = None) -> Sampler[int] | None:
        given = self.train_dataset if train_dataset is None else train_dataset
        return self._order.sampler(given) or super()._get_train_sampler(train_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The batches of one step, and Σ weight of its targets on all ranks; none if training is to stop."""
        output_dir = Path(str(self.args.output_dir)) if self.is_world_process_zero() else None
        self.progress.clock.start()
        # Also before the first step, and after one that was lost: Trainer itself asks only after a step.
        while not self.control.should_training_stop:
            step = self.state.global_step + 1
            self._ranks.at(step, "reading documents")
            loader = self._workers.batches(epoch_iterator)
            batches, read = read_step(self, loader, num_batches, self._interruption)
            self._ranks.at(step, "waiting for all to have read")
            counts = count_step(self._sums, batches, read, self._interruption.code)
            if counts.interrupted:
                self._checkpoints.save_and_end(signal_of(counts.interrupted))
            note_failed(counts.read, self.train_dataset, output_dir)
            if counts.weight > 0 or not counts.any_batch:
                self._finite.start_step([take_documents(batch) for batch in batches])
                self.progress.count(batches)
                self.progress.clock.end("data_wait")
                # Filled there: a copy from the CPU's memory would wait for the device.
                return batches, torch.full((), counts.weight, device=device)
            require_failed(step, counts)
            count_lost_step(self)
        return [], torch.zeros((), device=device)

    def get_train_dataloader(self) -> DataLoader[object]:
        """The loader of the packs, in their order; its batches stay where they are until they are used."""
        self.train_dataset = self._order.packs(self.train_dataset)
        loader = super().get_train_dataloader()
        # accelerate would send all batches of a step at once, and wait for each.
        vars(loader)["device"] = None
        return loader

    def training_step(
        self, model: nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Train on one batch of a step, which is sent to the device now."""
        on_device = sent(inputs, self.args.device, getattr(self.data_collator, "scales", None))
        loss = super().training_step(model, on_device, num_items_in_batch)
        self.progress.clock.end("backward")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Σ weight · nll of a batch over Σ weight of the step, as DDP's mean over ranks needs it."""
        require_bounds(self.model, inputs)
        losses = target_losses(model, inputs, self.args.loss_chunk)
        weight = losses.weights.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (losses.nll * losses.weights).sum() / weight * self.accelerator.num_processes
        if model.training:
            self._source_losses.add(losses)
        self.progress.clock.end("forward")
        return self._finite.watched(loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log for all that watch: callbacks, trackers, ``state.log_history``. All ranks call it together."""
        if "loss" in logs:
            of_sources = self._source_losses.take(self._sums.add)
            logs = {**logs, **self.progress.measures(self.args, self.state, logs["loss"], of_sources)}
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The configured optimizer over one group a tower, each with its learning rate."""
        if self.optimizer is None:
            tuned = self.model if model is None else model
            # Typed for a PreTrainedModel; Trainer itself hands it whatever is trained.
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, tuned)  # type: ignore[arg-type]
            groups = parameter_groups(
                tuned,
                **{key: getattr(self.args, key) for key in LEARNING_RATES.values()},
                weight_decay=self.args.weight_decay,
                decay_names=self.get_decay_parameter_names(tuned),
            )
            # From here the parent takes its groups; it keeps embeddings in 32 bits where the rest has 8.
            self.optimizer_cls_and_kwargs = optimizer_class, {**kwargs, "params": groups}
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule. Trainer then loads a checkpoint's states, so they are checked here."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._checkpoints.check_states(scheduler)
        return scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as others should find it.

        Raises:
            NotFiniteError: If a weight is not finite.
            WriteError: If the disk is full; nothing of the model is left then.
        """
        directory = Path(output_dir or str(self.args.output_dir))
        is_checkpoint = _internal_call and output_dir is not None
        with self._checkpoints.saving(directory, is_checkpoint=is_checkpoint), self._ranks.watched():
            super().save_model(output_dir, _internal_call)

    def evaluation_loop(
        self, dataloader: DataLoader[object], description: str, *args: object, **kwargs: object
    ) -> EvalLoopOutput:
        """Evaluate; a worker that dies or does not answer ends it as it ends training."""
        require_fillers(dataloader.dataset, self.data_collator, self.args)
        self._evaluated = dataloader.dataset
        vars(dataloader)["device"] = None  # as for training; prediction_step sends each batch
        with ExitStack() as stack:
            if not self.is_in_train:
                stack.callback(end_persistent_workers, dataloader)
                stack.enter_context(self._workers)
            awaited = self._workers.awaited(dataloader)
            output = super().evaluation_loop(awaited, description, *args, **kwargs)  # type: ignore[arg-type]
        require_few_failed(dataloader.dataset, self.args.world_size)
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Σ nll and targets of each row, which ``trainer_metrics`` adds up: no mean of means.

        And Σ nll with blank images, of a set that has some.
        """
        leave_out_failed(inputs, self._evaluated)
        take_documents(inputs)
        require_bounds(self.model, inputs)
        on_device = sent(inputs, self.args.device, getattr(self.data_collator, "scales", None))
        with torch.no_grad(), self.compute_loss_context_manager():
            if measures_blank(self._evaluated, self.args):
                sums = sums_with_blank(model, on_device, self.args, self._prepare_inputs)
            else:
                sums = row_sums(model, self._prepare_inputs(on_device), self.args.loss_chunk)
        return None, sums, sums[:, 1:2]
