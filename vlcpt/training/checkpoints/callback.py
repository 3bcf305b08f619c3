"""Checkpoints of a run: written whole, counted, and only then are older ones deleted."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vlcpt.config.training import CPTConfig
from vlcpt.file_writes import Writing, free_bytes, human_size, refusal, remove, sync
from vlcpt.folder_locks import hold
from vlcpt.model.base_files import BaseFiles, find_base_files
from vlcpt.model.tuning import base_model
from vlcpt.training.checkpoints.disk import (
    delete_checkpoint,
    finish_deletions,
    needed_bytes,
    next_steps,
    require_space,
    rotate,
    saved_bytes,
    small_bytes,
)
from vlcpt.training.checkpoints.files import (
    UNFINISHED,
    CheckpointError,
    Manifest,
    fault,
    find_checkpoint,
    list_checkpoints,
    require_own,
    require_states,
    verify,
    write_manifest,
    write_record,
)
from vlcpt.training.checkpoints.identity import (
    changed_rows,
    require_same_run,
    resumed_lines,
    run_facts,
    save_rows,
    settings_of,
)
from vlcpt.training.checkpoints.resume import check_adapter, restore_weights, save_now
from vlcpt.training.checkpoints.states import check_archives, check_progress, check_random
from vlcpt.training.engine import engine_stage
from vlcpt.training.guards import require_finite
from vlcpt.training.progress import RunProgress
from vlcpt.training.step import restore_failed, save_failed
from vlcpt.training.stop import end_interrupted

logger = logging.getLogger(__name__)


class Checkpoints(TrainerCallback):
    """What :class:`vlcpt.CPTTrainer` does about checkpoints: ``begin`` and ``on_save`` frame each save.

    Trainer of transformers 5.24 deletes old checkpoints before any callback runs, when nobody knows yet
    whether the new one is whole; so its own ``save_total_limit`` is off while it trains.

    Args:
        trainer: Whose checkpoints they are.
        args: Its configuration.
        model: What it trains, not wrapped.
        progress: Where a person reads of them.
    """

    def __init__(
        self, trainer: Trainer, args: CPTConfig, model: PreTrainedModel | PeftModel, progress: RunProgress
    ) -> None:
        self._trainer = trainer
        self._args = args
        self._model = model
        self._progress = progress
        self._facts: dict[str, object] | None = None
        self._writing: Path | None = None
        self._limit: int | None = None
        self._saved: int | None = None  # the step whose checkpoint is there
        self._base: list[BaseFiles | None] | None = None
        self._configured: list[dict[str, object]] = []  # of the optimizer, before a checkpoint is loaded
        self._resumed: Manifest | None = None

    @property
    def _output(self) -> Path:
        return Path(str(self._args.output_dir))

    def resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Choose a checkpoint, the same on all ranks, and load the weights that Trainer would not.

        Raises:
            CheckpointError: If none can be used, or it is of another run.
        """
        self._saved = self._facts = self._resumed = None
        facts = self._run_facts()  # of a fresh start as of a resume: before the model is wrapped
        if not resume_from_checkpoint:
            return None
        args = self._args
        found: list[Path | None] = [None]

        def choose() -> None:
            if args.process_index:
                return
            found[0] = find_checkpoint(resume_from_checkpoint, self._output, check=self._require_trust)
            if found[0] is not None:
                self._resumed = verify(found[0], hashes=False)
                run, rows = self._resumed.run, None
                if run.get("data") != facts.get("data"):
                    rows = changed_rows(self._trainer.train_dataset, found[0], run.get("sources"))
                require_same_run(found[0].name, run, facts, rows=rows)
                require_states(found[0], args.world_size)
                check_progress(found[0])

        self._together(choose)
        if args.world_size > 1:
            broadcast_object_list(found)
        if found[0] is None:
            return None
        if args.process_index == 0:
            logger.info("going on from %s", found[0])
        folder = found[0]
        self._together(lambda: self._check_files(folder))
        restore_failed(self._trainer.train_dataset, found[0], None if args.process_index else self._output)
        if found[0].resolve().parent == self._output.resolve():
            self._saved = int(found[0].name.rpartition("-")[2])
        return str(found[0])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around all of it: no other process trains in this folder, or its checkpoints would be mixed.

        Raises:
            ConfigError: If one does; on other ranks a CheckpointError with the same message.
        """
        with ExitStack() as stack:

            def take() -> None:
                if self._args.process_index == 0:
                    stack.enter_context(hold(self._output))

            self._together(take)
            yield

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

    def restore_best(self) -> None:
        """Load every tensor of the best checkpoint, where ``load_best_model_at_end`` asks for it.

        Raises:
            CheckpointError: If it does not verify any more, or has other tensors.
        """
        best, args = self._trainer.state.best_model_checkpoint, self._args
        if not args.load_best_model_at_end or not best:
            return

        def require_whole() -> None:
            if args.process_index == 0 and (reason := fault(Path(best))):
                raise CheckpointError(
                    f"the best checkpoint, {best}: {reason}, so the best model cannot be saved. Take another "
                    "checkpoint, or its copy."
                )

        self._together(require_whole)
        self._load(best)

    def save_and_end(self, code: float) -> NoReturn:
        """Save what the last step left, if there was one, on all ranks, and end as the signal asks.

        Args:
            code: See :func:`end_interrupted`.
        """
        step = self._trainer.state.global_step
        if step and step != self._saved:
            save_now(self._trainer)
        message = (
            "interrupted before the first step: nothing is trained yet, so there is no checkpoint. Start "
        )
        message += "again with --resume_from_checkpoint auto"
        if step:
            message = f"interrupted after step {step}: checkpoint-{step} is saved. Go on with "
            message += "--resume_from_checkpoint true"
        if self._trainer.is_world_process_zero():
            self._progress.console.print(message, highlight=False, soft_wrap=True)
        end_interrupted(code, message)

    def begin(self, folder: Path | None) -> None:
        """Before anything is saved: weights are finite, and a checkpoint has room and an empty folder.

        Args:
            folder: Of a checkpoint, into which no rank writes before this; None for any other save.

        Raises:
            CheckpointError: If the disk has too little room.
            NotFiniteError: If a weight is not finite.
        """
        if folder is None:
            # Not together: other ranks may not be here. Weights are equal on all, or cut under ZeRO-3.
            require_finite(self._model)
            return

        def prepare() -> None:
            require_finite(self._model)
            if not self._args.should_save:
                return
            finish_deletions(folder.parent)
            if folder.exists():  # left by a run that was killed, or by one that went on from an older one
                delete_checkpoint(folder)
            require_space(folder, self._needed(), self._whole())
            folder.mkdir(parents=True)
            (folder / UNFINISHED).touch()
            sync(folder)

        self._together(prepare)
        self._writing = folder

    @contextmanager
    def result(self, directory: Path) -> Iterator[None]:
        """Around the saving of a model that is no checkpoint: what fails leaves no part of it behind.

        Raises:
            WriteError: If the disk is full, or the folder cannot be written.
        """
        before = _written_at(directory)
        writing = Writing(directory, "the trained model", reads=True, todo=next_steps(self._whole()))
        writing.needed = saved_bytes(self._model)

        def take_back(kind: object, error: BaseException | None, trace: object) -> None:
            if self._args.should_save and error is not None and refusal(error, directory, reads=True):
                for path, when in _written_at(directory).items():
                    if before.get(path) != when:
                        remove(path)

        with writing, ExitStack() as stack:
            if self._args.should_save:
                writing.require_room()
            stack.push(take_back)
            yield

    def restore_base_files(self, directory: Path) -> None:
        """Give what was saved the base's own files, wherever training did not change what they say."""
        if (base := self._base_files()) is None:
            return
        model = base_model(self._model)
        is_adapter = isinstance(self._model, PeftModel)
        base.restore(directory, model=None if is_adapter else model)
        if not is_adapter:
            base.restore_config(directory)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Say which settings are the checkpoint's, and look for the best one where it is now."""
        # Trainer of transformers 5.24 saves, logs and evaluates as often as the checkpoint says;
        # tests/training/checkpoints/test_identity_resumed_settings.py tells when that ends.
        state.compute_steps(args, state.max_steps)
        optimizer = kwargs.get("optimizer")
        if self._resumed is not None and isinstance(optimizer, torch.optim.Optimizer):
            self._tell_resumed(state, optimizer)
        if state.best_model_checkpoint is None or not state.best_global_step:
            return
        best = self._output / f"checkpoint-{state.best_global_step}"
        reason = [""]
        if args.process_index == 0:
            try:
                self._require_trust(best, verify(best, hashes=args.load_best_model_at_end))
            except CheckpointError as error:
                reason[0] = str(error)
        if args.world_size > 1:
            broadcast_object_list(reason)
        if not reason[0]:
            state.best_model_checkpoint = str(best)
            return
        if args.load_best_model_at_end and args.process_index == 0:
            logger.warning(
                "the best checkpoint so far, %s, cannot be used: %s. The best is now chosen among those "
                "that follow.",
                best.name,
                reason[0],
            )
        state.best_model_checkpoint = state.best_metric = state.best_global_step = None

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the manifest when all ranks have written their files, and then delete older checkpoints."""
        folder = self._output / f"checkpoint-{state.global_step}"
        self._together(lambda: _flush_of_rank(folder, args.process_index))
        facts = self._run_facts()

        def finish() -> None:
            if args.should_save:
                assert facts is not None
                save_failed(self._trainer.train_dataset, folder)
                save_rows(self._trainer.train_dataset, folder)
                write_manifest(folder, facts)
                if self._trainer.is_deepspeed_enabled:
                    write_record(self._output, folder)
                best = state.best_model_checkpoint
                rotate(self._output, self._limit, newest=folder, best=Path(best) if best else None)

        self._together(finish)
        self._writing = None
        self._saved = state.global_step

    def note_configured(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep what the configuration asks of the optimizer, until a checkpoint is loaded into it."""
        self._configured = settings_of(optimizer.param_groups)

    def _tell_resumed(self, state: TrainerState, optimizer: torch.optim.Optimizer) -> None:
        """Print each setting in which checkpoint and configuration differ, and which of the two is used."""
        assert self._resumed is not None
        saved, now = (facts.get("settings", {}) for facts in (self._resumed.run, self._run_facts()))
        assert isinstance(now, Mapping)
        saved = saved if isinstance(saved, Mapping) else {}
        lines = resumed_lines(self._args, self._configured, optimizer, saved, now)
        if any(one.startswith(("metric_for_best_model", "greater_is_better")) for one in lines):
            # The best so far was measured by something else.
            state.best_model_checkpoint = state.best_metric = state.best_global_step = None
        for line in lines:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if any(line.endswith("the checkpoint's is used") for line in lines):
            self._progress.console.print(
                "To train on with the configuration's, start a new run from the checkpoint's weights.",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

    def _run_facts(self) -> dict[str, object]:
        """Facts of this run; empty on ranks that neither choose nor write, unless all must take part."""
        if self._facts is None:
            trainer, args = self._trainer, self._args
            is_cut = any(hasattr(one, "ds_id") for one in self._model.parameters())
            needed = is_cut or args.should_save or args.process_index == 0
            self._facts = run_facts(self._model, args, trainer.train_dataset) if needed else {}
        return self._facts

    def _require_trust(self, folder: Path, manifest: Manifest) -> None:
        """DeepSpeed unpickles what it finds; Trainer reads its own files without running code."""
        if self._trainer.is_deepspeed_enabled and not self._args.trust_checkpoint:
            require_own(self._output, folder)

    def _load(self, checkpoint: str) -> None:
        check_adapter(self._model, checkpoint)
        if not self._trainer.is_deepspeed_enabled:  # its engine loads every tensor itself
            restore_weights(self._model, checkpoint)

    def _check_files(self, folder: Path) -> None:
        """Look at what will be loaded into this rank, and load the weights that Trainer would not."""
        check_random(folder, self._args.process_index, self._args.world_size)
        if self._trainer.is_deepspeed_enabled:
            check_archives(folder)
        self._load(str(folder))

    def _whole(self) -> list[Path]:
        return [one for one in list_checkpoints(self._output) if not fault(one, hashes=False)]

    def _explain(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raise what hindered the writing of a checkpoint as an error that says what to do."""
        folder = self._writing
        if folder is None or error is None or (found := refusal(error, folder)) is None:
            return
        if self._args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # what it took is room for what comes next
        needed = human_size(self._needed())
        raise CheckpointError(
            f"{folder} could not be written: {found.reason}. It takes about {needed}, and "
            f"{human_size(free_bytes(folder))} are free there. {next_steps(self._whole())}"
        ) from error

    def _needed(self) -> int:
        """Bytes of a checkpoint of this moment."""
        trainer, args = self._trainer, self._args
        base = self._base_files()
        processor = trainer.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)
        files = 0 if base is None else base.size
        if base is None and isinstance(tokenizer, PreTrainedTokenizerFast):
            files = len(tokenizer.backend_tokenizer.to_str(pretty=True).encode())
        optimizer = None if args.save_only_model else trainer.optimizer
        stage = engine_stage(trainer.model_wrapped)
        return needed_bytes(self._model, optimizer, stage=stage, ranks=args.world_size) + small_bytes(
            files, args.world_size, len(trainer.state.log_history)
        )

    def _base_files(self) -> BaseFiles | None:
        if self._base is None:  # a base on the Hub is asked once for files that loading did not need
            config = base_model(self._model).config
            self._base = [find_base_files(config._name_or_path, getattr(config, "_commit_hash", None))]
        return self._base[0]

    def _together(self, work: Callable[[], None]) -> None:
        """Do something on each rank, wait for all of them, and raise on all what one has raised."""
        failed: Exception | None = None
        try:
            work()
        except (ValueError, OSError, RuntimeError) as error:
            failed = error
        if self._args.world_size > 1:
            reasons = gather_object([None if failed is None else str(failed)])
            others = [f"rank {rank}: {one}" for rank, one in enumerate(reasons) if one is not None]
            if others and failed is None:
                raise CheckpointError(others[0])
        if failed is not None:
            raise failed


def _written_at(directory: Path) -> dict[Path, int]:
    """When each file in a folder was last written."""
    if not directory.is_dir():
        return {}
    return {path: path.stat().st_mtime_ns for path in directory.iterdir() if path.is_file()}


def _flush_of_rank(folder: Path, rank: int) -> None:
    """Flush what this rank has written; the first one flushes all, but may be on another machine."""
    for path in folder.rglob(f"*rank_{rank}_*") if rank else ():
        sync(path)
    for path in folder.glob(f"rng_state_{rank}.pth"):
        sync(path)
