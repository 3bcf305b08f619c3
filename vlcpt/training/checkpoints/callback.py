"""Checkpoints of a run: chosen and loaded, saved and verified, and only then are older ones deleted."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINING_ARGS_NAME

from vlcpt.config.training import CPTConfig
from vlcpt.file_writes import free_bytes, human_size, refusal, sync
from vlcpt.folder_locks import hold
from vlcpt.model.base_files import BaseFiles, find_base_files
from vlcpt.model.tuning import base_model
from vlcpt.run_files import step_of
from vlcpt.training.checkpoints.disk import (
    delete_checkpoint,
    finish_deletions,
    flush_of_rank,
    needed_bytes,
    next_steps,
    require_space,
    result_or_nothing,
    rotate,
    small_bytes,
)
from vlcpt.training.checkpoints.files import (
    UNFINISHED,
    CheckpointError,
    Manifest,
    fault,
    find_checkpoint,
    require_own,
    require_states,
    verify,
    write_manifest,
    write_record,
)
from vlcpt.training.checkpoints.identity import (
    require_same_run,
    resumed_lines,
    run_facts,
    save_rows,
    saved_settings,
    settings_of,
)
from vlcpt.training.checkpoints.resume import check_adapter, declare_dtype, restore_weights
from vlcpt.training.checkpoints.states import (
    check_archives,
    check_optimizer,
    check_progress,
    check_random,
    check_scaler,
    check_scheduler,
)
from vlcpt.training.checkpoints.upstream import cache_in_saved_config, loaded_from, save_now, without_card
from vlcpt.training.engine import engine_stage
from vlcpt.training.guards import require_finite
from vlcpt.training.progress import RunProgress
from vlcpt.training.ranks import first_rank_only, together
from vlcpt.training.step import restore_failed, save_failed
from vlcpt.training.stop import end_interrupted

logger = logging.getLogger(__name__)

_GO_ON = "Go on with --resume_from_checkpoint true"
_UNTRAINED = (
    "interrupted before the first step: nothing is trained yet, so there is no checkpoint. Start again with "
    "--resume_from_checkpoint auto"
)


class Checkpoints(TrainerCallback):
    """What :class:`vlcpt.CPTTrainer` does about checkpoints: ``saving`` and ``on_save`` frame each save.

    Trainer of transformers 5.24 deletes old checkpoints before any callback runs, when nobody knows yet
    whether the new one is sound; so its own ``save_total_limit`` is off while it trains.

    Args:
        trainer: The trainer whose checkpoints these are.
        args: Its configuration.
        model: The model that it trains, not wrapped.
        progress: Shows what a person should read.
    """

    def __init__(
        self, trainer: Trainer, args: CPTConfig, model: PreTrainedModel | PeftModel, progress: RunProgress
    ) -> None:
        self._trainer, self._args, self._model, self._progress = trainer, args, model, progress
        self._facts: dict[str, object] | None = None
        self._writing: Path | None = None
        self._limit: int | None = None
        self._saved: int | None = None  # the step whose checkpoint is there
        self._resumed: Path | None = None
        self._resumed_facts: dict[str, object] = {}
        self._configured: list[dict[str, object]] = []  # of the optimizer, before a checkpoint is loaded

    @property
    def _output(self) -> Path:
        return Path(str(self._args.output_dir))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around all of it: no other process trains in this folder, or its checkpoints would be mixed.

        Raises:
            ConfigError: If one does.
        """
        with ExitStack() as stack:

            def take() -> None:
                stack.enter_context(hold(self._output))

            first_rank_only(self._args, take)
            yield

    def resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Choose a checkpoint, the same on all ranks, and load the weights that Trainer would not.

        Raises:
            CheckpointError: If none can be used, or it is of another run.
        """
        self._saved = self._facts = self._resumed = None
        facts = self._run_facts()  # also of a fresh start: before the model is wrapped

        def choose() -> tuple[Path, dict[str, object]] | None:
            folder = find_checkpoint(resume_from_checkpoint, self._output, check=self._require_trust)
            if folder is None:
                return None
            saved = verify(folder, hashes=False).run
            require_same_run(folder, saved, facts, self._trainer.train_dataset)
            require_states(folder, self._args.world_size)
            check_progress(folder)
            logger.info("resuming from %s", folder)
            return folder, dict(saved)

        chosen = first_rank_only(self._args, choose)
        if chosen is None:
            return None
        folder, self._resumed_facts = chosen
        together(self._args, lambda: self._load_checked(folder))
        restore_failed(
            self._trainer.train_dataset, folder, None if self._args.process_index else self._output
        )
        self._resumed = folder
        if folder.resolve().parent == self._output.resolve():
            self._saved = step_of(folder)
        return str(folder)

    def _load_checked(self, folder: Path) -> None:
        """Look at what Trainer will load into this rank, and load the weights that it would not."""
        check_random(folder, self._args.process_index, self._args.world_size)
        if self._trainer.is_deepspeed_enabled:
            check_archives(folder)
        self._load(str(folder))

    def _load(self, checkpoint: str) -> None:
        check_adapter(self._model, checkpoint)
        if not self._trainer.is_deepspeed_enabled:  # its engine loads every tensor itself
            restore_weights(self._model, checkpoint)

    def note_configured(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what the configuration asks of the optimizer, until a checkpoint is loaded into it."""
        self._configured = settings_of(optimizer.param_groups)

    def check_states(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Refuse states of a checkpoint that are not of this optimizer and schedule, before they are loaded.

        Raises:
            CheckpointError: With the file.
        """
        if self._resumed is not None and not self._trainer.is_deepspeed_enabled:
            assert self._trainer.optimizer is not None
            check_optimizer(self._resumed, self._trainer.optimizer)
            check_scheduler(self._resumed, scheduler)
            check_scaler(self._resumed)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around training: checkpoints are rotated here, and a save that fails says what it needed."""
        args, handler = self._args, self._trainer.callback_handler
        # The last to act: what other callbacks put into a checkpoint belongs to it.
        handler.callbacks.remove(self)
        handler.callbacks.append(self)
        self._limit, args.save_total_limit = args.save_total_limit, None
        self._writing = None
        try:
            with ExitStack() as stack:
                stack.push(self._explain)
                yield
        finally:
            args.save_total_limit = self._limit

    def _explain(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise what hindered the writing of a checkpoint as an error that says what to do."""
        folder = self._writing
        if folder is None or error is None or (found := refusal(error, folder)) is None:
            return
        if self._args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # what it took is room for what comes next
        raise CheckpointError(
            f"{folder} could not be written: {found.reason}. It takes about {human_size(self._needed())}, "
            f"and {human_size(free_bytes(folder))} are free there. {next_steps(self._output)}"
        ) from error

    def restore_best(self) -> None:
        """Load every tensor of the best checkpoint, where ``load_best_model_at_end`` asks for it.

        Raises:
            CheckpointError: If it does not verify any more, or has other tensors.
        """
        best = self._trainer.state.best_model_checkpoint
        if not self._args.load_best_model_at_end or not best:
            return
        if reason := first_rank_only(self._args, lambda: fault(Path(best))):
            raise CheckpointError(
                f"the best checkpoint, {best}: {reason}, so the best model cannot be saved. Take another "
                "checkpoint, or its copy."
            )
        self._load(best)

    def save_and_end(self, code: float) -> NoReturn:
        """Save what the last step left, if there was one, on all ranks, and end as the signal asks.

        Args:
            code: See :func:`end_interrupted`.
        """
        step = self._trainer.state.global_step
        if step and step != self._saved:
            save_now(self._trainer)
        message = _UNTRAINED
        if step:
            message = f"interrupted after step {step}: checkpoint-{step} is saved. {_GO_ON}"
        if self._trainer.is_world_process_zero():
            self._progress.console.print(message, highlight=False, soft_wrap=True)
        end_interrupted(code, message)

    @contextmanager
    def saving(self, directory: Path, *, is_checkpoint: bool) -> Iterator[None]:
        """Around Trainer's saving of a model, which others should find as they expect it.

        Generation wants the cache that training must not use, a plain load must not round what was
        trained, Trainer's pickle of all arguments holds tokens in clear, and PEFT's card paths.

        Raises:
            CheckpointError, WriteError: If the disk has too little room, or cannot be written.
            NotFiniteError: If a weight is not finite.
        """
        with ExitStack() as stack:
            if is_checkpoint:
                together(self._args, lambda: self._begin(directory))
                self._writing = directory
            else:
                # Not together: other ranks may not be here. Weights are equal on all, or cut under ZeRO-3.
                require_finite(self._model)
                if self._args.should_save:
                    stack.enter_context(result_or_nothing(directory, self._model, self._output))
            with cache_in_saved_config(base_model(self._model).config), without_card(self._model):
                yield
            if self._args.should_save:
                declare_dtype(directory)
                _restore_base_files(self._base_files, directory, self._model)
                (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _begin(self, folder: Path) -> None:
        """Before a checkpoint is saved: weights are finite, and it has room and an empty folder."""
        require_finite(self._model)
        if not self._args.should_save:
            return
        finish_deletions(folder.parent)
        if folder.exists():  # left by a run that was killed, or that was resumed from an older one
            delete_checkpoint(folder)
        require_space(folder, self._needed(), self._output)
        folder.mkdir(parents=True)
        (folder / UNFINISHED).touch()
        sync(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Say which settings are the checkpoint's, and look for the best one where it is now."""
        # Trainer of transformers 5.24 saves, logs and evaluates as often as the checkpoint says;
        # tests/training/checkpoints/test_identity_resumed_settings.py tells when that ends.
        state.compute_steps(args, state.max_steps)
        if self._resumed is not None:
            self._report_resumed(state)
        if state.best_model_checkpoint is None or not state.best_global_step:
            return
        best = self._output / f"checkpoint-{state.best_global_step}"
        needs_hashes = bool(args.load_best_model_at_end)
        reason = first_rank_only(args, lambda: fault(best, self._require_trust, hashes=needs_hashes))
        if not reason:
            state.best_model_checkpoint = str(best)
            return
        if needs_hashes and args.process_index == 0:
            logger.warning(
                "the best checkpoint so far, %s, cannot be used: %s. The best is now chosen among those "
                "that follow.",
                best.name,
                reason,
            )
        _forget_best(state)

    def _report_resumed(self, state: TrainerState) -> None:
        """Print each setting in which checkpoint and configuration differ, and which of the two is used."""
        assert self._trainer.optimizer is not None
        saved = self._resumed_facts.get("settings")
        lines = resumed_lines(
            self._args,
            self._configured,
            self._trainer.optimizer.param_groups,
            saved if isinstance(saved, dict) else {},
            saved_settings(self._model, self._args),
        )
        if any(one.startswith(("metric_for_best_model", "greater_is_better")) for one in lines):
            _forget_best(state)  # it was measured by something else
        if any(line.endswith("the checkpoint's is used") for line in lines):
            lines.append(
                "To train on with the configuration's, start a new run from the checkpoint's weights."
            )
        if state.is_world_process_zero:
            for line in lines:
                self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the manifest when all ranks have written their files, and then delete older checkpoints."""
        folder = self._output / f"checkpoint-{state.global_step}"
        together(args, lambda: flush_of_rank(folder, args.process_index))
        facts = self._run_facts()

        def finish() -> None:
            if args.should_save:
                save_failed(self._trainer.train_dataset, folder)
                save_rows(self._trainer.train_dataset, folder)
                write_manifest(folder, facts)
                if self._trainer.is_deepspeed_enabled:
                    write_record(self._output, folder)
                best = state.best_model_checkpoint
                rotate(self._output, self._limit, newest=folder, best=Path(best) if best else None)

        together(args, finish)
        self._writing = None
        self._saved = state.global_step

    def _run_facts(self) -> dict[str, object]:
        """Facts of this run; empty on ranks that neither choose nor write, unless all must take part."""
        if self._facts is None:
            args = self._args
            is_cut = any(hasattr(one, "ds_id") for one in self._model.parameters())
            needed = is_cut or args.should_save or args.process_index == 0
            self._facts = run_facts(self._model, args, self._trainer.train_dataset) if needed else {}
        return self._facts

    def _require_trust(self, folder: Path, manifest: Manifest) -> None:
        """DeepSpeed unpickles what it finds; Trainer reads its own files without running code."""
        if self._trainer.is_deepspeed_enabled and not self._args.trust_checkpoint:
            require_own(self._output, folder)

    def _needed(self) -> int:
        """Bytes that a checkpoint takes now."""
        trainer, args = self._trainer, self._args
        states = needed_bytes(
            self._model,
            None if args.save_only_model else trainer.optimizer,
            stage=engine_stage(trainer.model_wrapped),
            ranks=args.world_size,
        )
        processor, logged = self._base_files or trainer.processing_class, len(trainer.state.log_history)
        return states + small_bytes(processor, args.world_size, logged)

    @cached_property
    def _base_files(self) -> BaseFiles | None:
        """The base's own files; a base on the Hub is asked once for those that loading did not need."""
        return find_base_files(*loaded_from(base_model(self._model)))


def _restore_base_files(base: BaseFiles | None, directory: Path, model: PreTrainedModel | PeftModel) -> None:
    """Give what was saved the base's own files, wherever training did not change what they say."""
    if base is None:
        return
    is_adapter = isinstance(model, PeftModel)
    base.restore(directory, model=None if is_adapter else base_model(model))
    if not is_adapter:
        base.restore_config(directory)


def _forget_best(state: TrainerState) -> None:
    state.best_model_checkpoint = state.best_metric = state.best_global_step = None
