"""CPTTrainer: transformers' Trainer, with the loss, the resume and the evaluation of this library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.training_args import OptimizerNames

from vlcpt.config.training import CPTConfig
from vlcpt.data.collator import Batch, CPTDataCollator
from vlcpt.data.workers import Workers, end_persistent_workers
from vlcpt.model.tuning import base_model, limit_checkpointing, parameter_groups
from vlcpt.training.checkpoints.callback import Checkpoints
from vlcpt.training.checkpoints.resume import (
    StepSeeds,
    cache_in_saved_config,
    count_lost_step,
    declare_dtype,
    quiet_partial_load,
    without_card,
)
from vlcpt.training.checkpoints.states import check_optimizer, check_scaler, check_scheduler
from vlcpt.training.engine import (
    AttentionCheck,
    EngineCheck,
    allow_unused,
    fill_step,
    modalities_to_fill,
    unrepeat,
)
from vlcpt.training.evaluate import row_sums, trainer_metrics
from vlcpt.training.guards import FiniteNumbers, check_launch, check_model, check_settings, require_bounds
from vlcpt.training.loss import target_losses, total_weight
from vlcpt.training.progress import RunProgress
from vlcpt.training.ranks import RankWatch
from vlcpt.training.step import (
    NoStepLeft,
    leave_out_failed,
    note_failed,
    reading,
    take_documents,
    take_failed,
    watched,
)
from vlcpt.training.stop import Interruption


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
        check_launch(args)
        check_model(model, args)
        check_settings(model, args)
        if data_collator is None:
            if processing_class is None:
                raise ValueError("CPTTrainer needs processing_class (the processor), or a data_collator.")
            data_collator = CPTDataCollator(processing_class)
        # Trainer turns off only the outer one; the text model reads its own, and a cache lets the
        # documents of a pack see each other.
        base_model(model).config.get_text_config().use_cache = False
        sets = eval_dataset.values() if isinstance(eval_dataset, Mapping) else [eval_dataset]
        filled = modalities_to_fill(model, args, [one for one in (train_dataset, *sets) if one is not None])
        allow_unused(model, args, filled)
        self.progress = RunProgress(args.max_length if args.packing else None, console)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,  # type: ignore[arg-type]
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=trainer_metrics,
            callbacks=[*(callbacks or []), self.progress, StepSeeds(), _LimitCheckpointing()],
        )
        # accelerate's sampler would take its seed from torch, which StepSeeds moves: a second train() would
        # read another order, and each rank its own.
        self.accelerator.dataloader_config.data_seed = args.seed if args.data_seed is None else args.data_seed
        _remove_upstream_progress(self)
        self.add_callback(EngineCheck(self, self.progress.console))
        self.add_callback(AttentionCheck(self, self.progress.console))
        self.add_callback(NoStepLeft(self.progress.console))
        self._interruption = Interruption()
        self._evaluated: object = None
        self._workers = Workers(args.dataloader_timeout, lambda: watched(self.train_dataset, self._evaluated))
        self._finite = FiniteNumbers(self)
        self.add_callback(self._finite)
        self._ranks = RankWatch(args, lambda: reading(self.train_dataset))
        self.add_callback(self._ranks)
        self._checkpoints = Checkpoints(self, self.args, self.model, self.progress)
        self.add_callback(self._checkpoints)
        if isinstance(self.data_collator, CPTDataCollator):
            self.data_collator.fill_modalities = filled
            self.data_collator.names_documents = True
            self.data_collator.window_size = base_model(model).config.vision_config.window_size
        self.loss_is_scaled_for_ga = True

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
            CheckpointError: If the checkpoint cannot be used, or one cannot be written.
            NotFiniteError: If a loss or a gradient is not finite; the step is not saved.
            SystemExit, KeyboardInterrupt: After SIGTERM (143) or SIGINT, when a checkpoint is saved.
        """
        with ExitStack() as held:
            # Trainer 5.24 keeps those of evaluation; after an error their workers are gone.
            self.__dict__.pop("_eval_dataloaders", None)
            with self._ranks.watched():
                held.enter_context(self._checkpoints.held())
                checkpoint = self._checkpoints.resume(resume_from_checkpoint)
            with (
                quiet_partial_load(),
                self._workers,
                self.progress,
                self._interruption.caught(),
                self._checkpoints.kept(),
                self._ranks.watched(),
            ):
                output = super().train(checkpoint, trial, ignore_keys_for_eval)
            evaluated = self.__dict__.pop("_eval_dataloaders", {})
            for loader in (self.callback_handler.train_dataloader, *evaluated.values()):
                end_persistent_workers(loader)
            self._checkpoints.restore_best()
        return output

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor]:
        """The batches of one step, and Σ weight of its targets on all ranks; none if training is to stop."""
        # Also before the first step, and after one that was lost: Trainer itself asks only after a step.
        while not self.control.should_training_stop:
            self._ranks.at(self.state.global_step + 1, "reading documents")
            batches: list[Batch] = []
            if not self._interruption.is_requested:
                with self._interruption.while_loading():
                    awaited = self._workers.batches(epoch_iterator)
                    batches, _ = super().get_batch_samples(awaited, num_batches, device)
            if self.accelerator.gradient_state.end_of_dataloader or len(batches) < num_batches:
                unrepeat(batches, self.train_dataset, self.args)
            read = [take_failed(batch) for batch in batches]
            fill_step(batches, num_batches)
            failed = any(one.failed for one in read)
            weight = sum((total_weight(batch) for batch in batches), torch.zeros(()))
            told = torch.tensor([float(weight), failed, len(batches), self._interruption.code], device=device)
            self._ranks.at(self.state.global_step + 1, "waiting for all to have read")
            counts = self.accelerator.reduce(told, "sum")
            weight, failed_anywhere, any_batch, interrupted = counts.tolist()
            if interrupted:
                self._checkpoints.save_and_end(interrupted)
            if failed_anywhere:
                read = gather_object(read)  # every rank then has the same ledger, and stops or goes on alike
            directory = Path(str(self.args.output_dir)) if self.is_world_process_zero() else None
            note_failed(read, self.train_dataset, directory)
            if weight > 0 or not any_batch:
                self._finite.start_step([take_documents(batch) for batch in batches])
                self.progress.count(batches)
                return batches, counts[0]
            if not failed_anywhere:
                raise ValueError(
                    f"step {self.state.global_step + 1} has no target in any batch, so it has no loss. "
                    "CPTDataset leaves such documents out; let your own data set do the same."
                )
            count_lost_step(self)
        return [], torch.zeros((), device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Σ weight · nll of a batch over Σ weight of the step, as DDP's mean over ranks needs it."""
        require_bounds(self.model, inputs)
        losses = target_losses(model, inputs)
        weight = losses.weights.sum() if num_items_in_batch is None else num_items_in_batch
        loss = (losses.nll * losses.weights).sum() / weight * self.accelerator.num_processes
        return self._finite.watched(loss)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The configured optimizer over one group a tower, each with its learning rate."""
        if self.optimizer is None:
            tuned = self.model if model is None else model
            # Typed for a PreTrainedModel; Trainer itself hands it whatever is trained.
            optimizer_class, kwargs = self.get_optimizer_cls_and_kwargs(self.args, tuned)  # type: ignore[arg-type]
            groups = parameter_groups(
                tuned,
                learning_rate=self.args.learning_rate,
                vision_learning_rate=self.args.vision_learning_rate,
                merger_learning_rate=self.args.merger_learning_rate,
                embedding_learning_rate=self.args.embedding_learning_rate,
                weight_decay=self.args.weight_decay,
                decay_names=self.get_decay_parameter_names(tuned),
            )
            # Some are no classes of optimizers but factories, and some bring their own groups.
            is_plain = isinstance(optimizer_class, type) and issubclass(
                optimizer_class, torch.optim.Optimizer
            )
            if not is_plain or {"params", "model", "optimizer_dict"} & set(kwargs):
                raise ValueError(
                    f"optim {OptimizerNames(self.args.optim).value} makes its own parameter groups, so "
                    "towers cannot have learning rates of their own. Use adamw_torch, adamw_torch_fused, "
                    "adamw_bnb_8bit or another optimizer that takes groups."
                )
            # From here the parent takes its groups; it keeps embeddings in 32 bits where the rest has 8.
            self.optimizer_cls_and_kwargs = optimizer_class, {**kwargs, "params": groups}
        made = super().create_optimizer(model)
        self._checkpoints.note_configured(made)
        return made

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of a checkpoint, once they are known to be of this optimizer and scheduler.

        No public name of transformers 5.24 is called between their making and their loading;
        tests/test_forged.py tells whether this one still is.
        """
        if checkpoint is not None and not self.is_deepspeed_enabled:
            assert self.optimizer is not None and self.lr_scheduler is not None
            check_optimizer(Path(checkpoint), self.optimizer)
            check_scheduler(Path(checkpoint), self.lr_scheduler)
            check_scaler(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as others should find it.

        Generation wants the cache that training must not use, a plain load must not round what was
        trained, Trainer's pickle of all arguments holds tokens in clear, and PEFT's card paths.

        Raises:
            NotFiniteError: If a weight is not finite.
            WriteError: If the disk is full; nothing of the model is left then.
        """
        directory = Path(output_dir or str(self.args.output_dir))
        is_checkpoint = _internal_call and output_dir is not None
        self._checkpoints.begin(directory if is_checkpoint else None)
        config = base_model(self.model).config
        with ExitStack() as saving:
            if not is_checkpoint:
                saving.enter_context(self._checkpoints.result(directory))
            with cache_in_saved_config(config), without_card(self.model), self._ranks.watched():
                super().save_model(output_dir, _internal_call)
            if self.args.should_save:
                declare_dtype(directory)
                self._checkpoints.restore_base_files(directory)
                (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def evaluation_loop(
        self,
        dataloader: DataLoader[object],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate; a worker that dies or does not answer ends it as it ends training."""
        self._evaluated = dataloader.dataset
        with ExitStack() as stack:
            if not self.is_in_train:
                stack.callback(end_persistent_workers, dataloader)
                stack.enter_context(self._workers)
            return super().evaluation_loop(
                self._workers.awaited(dataloader),  # type: ignore[arg-type]
                description,
                prediction_loss_only,
                ignore_keys,
                metric_key_prefix,
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Σ nll and targets of each row, which ``trainer_metrics`` adds up: no mean of means."""
        leave_out_failed(inputs)
        take_documents(inputs)
        require_bounds(self.model, inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = row_sums(model, self._prepare_inputs(dict(inputs)))
        return None, sums, sums[:, 1:]


class _LimitCheckpointing(TrainerCallback):
    """Keeps activation checkpointing off frozen towers; Trainer turns it on in ``train``."""

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if args.activation_checkpointing:
            limit_checkpointing(model)


def _remove_upstream_progress(trainer: Trainer) -> None:
    """Take out the bar and the printer of transformers, which would write beside ours."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("ProgressCallback", "PrinterCallback", "RichProgressCallback"):
            trainer.remove_callback(callback)
