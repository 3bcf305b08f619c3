"""Checkpoints of a run: chosen and loaded, saved completely or not at all, then older ones deleted."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, reduce
from pathlib import Path
from typing import NoReturn

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.modeling_utils import str_to_torch_dtype
from transformers.trainer import TRAINING_ARGS_NAME

from vlcpt.config.training import CPTConfig
from vlcpt.file_writes import Writing, remove, sync
from vlcpt.folder_locks import hold
from vlcpt.interrupts import interrupt
from vlcpt.model.base_files import BaseFiles, find_base_files, set_type
from vlcpt.model.tuning import base_model
from vlcpt.model.weights import weight_files
from vlcpt.run_files import step_of
from vlcpt.training.checkpoints.files import (
    UNFINISHED,
    CheckpointError,
    Manifest,
    delete_checkpoint,
    find_checkpoint,
    finish_deletions,
    flush_of_rank,
    next_steps,
    require_own,
    require_states,
    rotate,
    verify,
    why_unusable,
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
from vlcpt.training.checkpoints.resume import (
    check_adapter,
    check_optimizer,
    check_progress,
    check_random,
    check_scaler,
    check_scheduler,
    restore_weights,
)
from vlcpt.training.checkpoints.sizes import needed_bytes, saved_weights, size_of
from vlcpt.training.checkpoints.upstream import cache_in_saved_config, loaded_from, save_now, without_card
from vlcpt.training.guards import require_finite
from vlcpt.training.order import PackOrder
from vlcpt.training.progress import RunProgress
from vlcpt.training.ranks import first_rank_only, together
from vlcpt.training.step import restore_failed, save_failed

logger = logging.getLogger(__name__)


class Checkpoints(TrainerCallback):
    """What :class:`vlcpt.CPTTrainer` does about checkpoints: ``saving`` and ``on_save`` frame each save.

    Trainer of transformers 5.24 deletes old checkpoints before any callback runs, when it is not known yet
    whether the new one is sound; so its own ``save_total_limit`` is off while it trains.

    Args:
        trainer: The trainer whose checkpoints these are.
        args: Its configuration.
        model: The model that it trains, not wrapped.
        progress: Shows what a person should read.
        order: In which packs are read; a checkpoint's is kept.
    """

    def __init__(
        self,
        trainer: Trainer,
        args: CPTConfig,
        model: PreTrainedModel | PeftModel,
        progress: RunProgress,
        order: PackOrder,
    ) -> None:
        self._trainer, self._args, self._model, self._progress = trainer, args, model, progress
        self._order = order
        self._output = Path(str(args.output_dir))
        self._facts: dict[str, object] = {}  # of this run
        self._writing: Writing | None = None
        self._limit: int | None = None
        self._saved: int | None = None  # the step whose checkpoint is there
        self._resumed: Path | None = None
        self._resumed_facts: dict[str, object] = {}
        self._configured: list[dict[str, object]] = []  # of the optimizer, before a checkpoint is loaded
        self._is_finished = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around all of it: no other process trains in this folder, or its checkpoints would be mixed.

        Raises:
            ConfigError: If one does.
        """
        with ExitStack() as stack:
            first_rank_only(self._args, lambda: stack.enter_context(hold(self._output)))
            yield

    def resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Choose a checkpoint, the same on all ranks, and load the weights that Trainer would not.

        Raises:
            CheckpointError: If none can be used, or it is of another run.
        """
        args, dataset = self._args, self._trainer.train_dataset
        self._saved = self._resumed = None
        # Also of a new run, before the model is wrapped. Ranks that neither choose nor write need none, but
        # partitioned weights are gathered by all.
        is_cut = any(hasattr(one, "ds_id") for one in self._model.parameters())
        needs_facts = is_cut or args.should_save or args.process_index == 0
        self._facts = run_facts(self._model, args, dataset) if needs_facts else {}

        def choose() -> tuple[Path, dict[str, object]] | None:
            folder = find_checkpoint(resume_from_checkpoint, self._output, check=self._require_trust)
            if folder is None:
                return None
            saved = verify(folder, hashes=False).run
            require_same_run(folder, saved, self._facts, dataset)
            require_states(folder, args.world_size)
            check_progress(folder)
            logger.info("resuming from %s", folder)
            return folder, dict(saved)

        chosen = first_rank_only(args, choose)
        self._facts["balance"] = self._order.choose(None if chosen is None else chosen[1])
        if chosen is None:
            return None
        folder, self._resumed_facts = chosen

        def load() -> None:
            check_random(folder, args.process_index, args.world_size)
            self._load(str(folder))

        together(load)
        restore_failed(dataset, folder, None if args.process_index else self._output)
        self._resumed = folder
        if folder.resolve().parent == self._output.resolve():
            self._saved = step_of(folder)
        return str(folder)

    def _load(self, checkpoint: str) -> None:
        """Check an adapter, which Trainer loads, or load what it would not; DeepSpeed loads all itself."""
        if isinstance(self._model, PeftModel):
            check_adapter(self._model, checkpoint)
        elif not self._trainer.is_deepspeed_enabled:
            restore_weights(self._model, checkpoint)

    def check_states(self, scheduler: LRScheduler) -> None:
        """Refuse states of a checkpoint that are not of this optimizer and schedule, before they are loaded.

        Raises:
            CheckpointError: With the file.
        """
        optimizer = self._trainer.optimizer
        assert optimizer is not None
        # DeepSpeed may not have made its own yet.
        self._configured = settings_of(getattr(optimizer, "param_groups", []))
        if self._resumed is not None and not self._trainer.is_deepspeed_enabled:
            check_optimizer(self._resumed, optimizer)
            check_scheduler(self._resumed, scheduler)
            check_scaler(self._resumed, self._trainer.accelerator.scaler)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around training: older checkpoints are deleted here, and a save that fails says what it needed.

        Raises:
            WriteError: If a checkpoint could not be written.
        """
        args, handler = self._args, self._trainer.callback_handler
        # The last to act: what other callbacks put into a checkpoint belongs to it.
        handler.callbacks.remove(self)
        handler.callbacks.append(self)
        self._limit, args.save_total_limit = args.save_total_limit, None
        self._writing = None
        try:
            yield
        except BaseException as error:
            if self._writing is None:
                raise
            if args.should_save and self._writing.refused(error):
                # What it took is room for what comes next.
                shutil.rmtree(self._writing.path, ignore_errors=True)
            with self._writing:
                raise
        finally:
            args.save_total_limit = self._limit

    def restore_best(self) -> None:
        """Load every tensor of the best checkpoint, where ``load_best_model_at_end`` asks for it.

        Raises:
            CheckpointError: If it does not verify any more, or has other tensors.
        """
        best = self._trainer.state.best_model_checkpoint
        if not self._args.load_best_model_at_end or not best:
            return
        if reason := first_rank_only(self._args, lambda: why_unusable(Path(best))):
            raise CheckpointError(
                f"the best checkpoint, {best}: {reason}, so the best model cannot be saved. Take another "
                "checkpoint, or its copy."
            )
        self._load(best)

    def save_and_end(self, number: int) -> NoReturn:
        """Save what the last step left, if there was one, on all ranks, and end as a signal asks."""
        step = self._trainer.state.global_step
        if step and step != self._saved:
            save_now(self._trainer)
        if self._args.process_index == 0:
            self._progress.say(
                f"interrupted after step {step}: checkpoint-{step} is saved. Continue with "
                "--resume_from_checkpoint true"
                if step
                else "interrupted before the first step: nothing is trained yet, so there is no checkpoint. "
                "Start again with --resume_from_checkpoint auto"
            )
        interrupt(number)

    @contextmanager
    def saving(self, directory: Path, *, is_checkpoint: bool) -> Iterator[None]:
        """Around Trainer's saving of a model, which others should find as they expect it.

        Generation needs the cache that training must not use, a plain load must not round what was
        trained, Trainer's pickle of all arguments holds tokens in clear, and PEFT's card paths.

        Raises:
            WriteError: If the disk has too little room, or cannot be written.
            NotFiniteError: If a weight is not finite.
        """
        model, saves, is_adapter = self._model, self._args.should_save, isinstance(self._model, PeftModel)
        with ExitStack() as stack:
            if is_checkpoint:
                together(lambda: self._begin(directory))
            else:
                # Not together: other ranks may not be here. Weights are equal on all, or cut under ZeRO-3.
                require_finite(model)
                if saves:
                    stack.enter_context(result_or_nothing(directory, model, self._output))
            with cache_in_saved_config(base_model(model).config), without_card(model):
                yield
            if not saves:
                return
            declare_dtype(directory)
            if (base := self._base_files) is not None:
                base.restore(directory, model=None if is_adapter else base_model(model))
                if not is_adapter:
                    base.restore_config(directory)
            (directory / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _begin(self, folder: Path) -> None:
        """Before a checkpoint is saved: weights are finite, and it has room and an empty folder."""
        require_finite(self._model)
        if not self._args.should_save:
            self._writing = Writing(folder)
            return
        finish_deletions(folder.parent)
        if folder.exists():  # left by a run that was killed, or that was resumed from an older one
            delete_checkpoint(folder)
        # From here on, what is in the folder is of this save, and goes with it.
        needed = needed_bytes(self._trainer, self._model, self._base_files)
        self._writing = Writing(folder, needed=needed, todo=next_steps(self._output))
        self._writing.require_room()
        folder.mkdir(parents=True)
        (folder / UNFINISHED).touch()
        sync(folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Say which settings are the checkpoint's, look for the best one where it is now, and for a step.

        Trainer of transformers 5.24 looks at ``max_steps`` only after a step, so that each resume in the
        middle of an epoch would train another one. Before the first one ``CPTTrainer`` asks ``control``.
        """
        # Trainer of transformers 5.24 saves, logs and evaluates as often as the checkpoint says;
        # tests/training/checkpoints/test_identity_resumed_settings.py shows when that ends.
        state.compute_steps(args, state.max_steps)
        lines = [] if self._resumed is None else self._resumed_lines()
        if any(one.startswith(("metric_for_best_model", "greater_is_better")) for one in lines):
            _forget_best(state)  # it was measured by something else
        self._is_finished = 0 < state.max_steps <= state.global_step
        if self._is_finished:
            control.should_training_stop = True
            lines.append(
                f"step {state.global_step} of {state.max_steps} is done: no step is left to train, and "
                "the weights stay as they were saved. To train on, raise max_steps or num_train_epochs."
            )
        for line in lines if state.is_world_process_zero else ():
            self._progress.say(line)
        if state.best_model_checkpoint is None or not state.best_global_step:
            return
        best = self._output / f"checkpoint-{state.best_global_step}"
        needs_hashes = bool(args.load_best_model_at_end)
        reason = first_rank_only(args, lambda: why_unusable(best, self._require_trust, hashes=needs_hashes))
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

    def _resumed_lines(self) -> list[str]:
        """Each setting in which checkpoint and configuration differ, and which of the two is used."""
        optimizer, saved = self._trainer.optimizer, self._resumed_facts.get("settings")
        assert optimizer is not None
        lines = resumed_lines(
            self._args,
            self._configured,
            settings_of(optimizer.param_groups),
            saved if isinstance(saved, dict) else {},
            saved_settings(self._model, self._args),
        )
        if any(line.endswith("the checkpoint's is used") for line in lines):
            lines.append(
                "To train on with the configuration's, start a new run from the checkpoint's weights."
            )
        return lines

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let an epoch in which no step was left save and measure nothing."""
        if self._is_finished:
            control.should_save = control.should_evaluate = False

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Write the manifest when all ranks have written their files, and then delete older checkpoints."""
        folder, dataset = self._output / f"checkpoint-{state.global_step}", self._trainer.train_dataset
        together(lambda: flush_of_rank(folder, args.process_index))

        def finish() -> None:
            if args.should_save:
                save_failed(dataset, folder)
                save_rows(dataset, folder)
                write_manifest(folder, self._facts)
                if self._trainer.is_deepspeed_enabled:
                    write_record(self._output, folder)
                best = state.best_model_checkpoint
                rotate(self._output, self._limit, newest=folder, best=Path(best) if best else None)

        together(finish)
        self._writing = None
        self._saved = state.global_step

    def _require_trust(self, folder: Path, manifest: Manifest) -> None:
        """DeepSpeed unpickles what it finds; Trainer reads its own files without running code."""
        if self._trainer.is_deepspeed_enabled and not self._args.trust_checkpoint:
            require_own(self._output, folder)

    @cached_property
    def _base_files(self) -> BaseFiles | None:
        """The base's own files; a base on the Hub is asked once for those that loading did not need."""
        return find_base_files(*loaded_from(base_model(self._model)))


def _forget_best(state: TrainerState) -> None:
    state.best_model_checkpoint = state.best_metric = state.best_global_step = None


@contextmanager
def result_or_nothing(directory: Path, model: nn.Module, output_dir: Path) -> Iterator[None]:
    """Around the saving of a model that is no checkpoint: what fails leaves no part of it behind.

    Args:
        directory: The folder that the model is saved in.
        model: The model.
        output_dir: The run's folder; the message names its newest checkpoint.

    Raises:
        WriteError: If the disk is full, or the folder cannot be written.
    """

    def written_at() -> dict[Path, int]:
        files = directory.iterdir() if directory.is_dir() else ()
        return {path: path.stat().st_mtime_ns for path in files if path.is_file()}

    before, needed = written_at(), size_of(saved_weights(model))
    with Writing(
        directory, "the trained model", needed=needed, reads=True, todo=next_steps(output_dir)
    ) as writing:
        writing.require_room()
        try:
            yield
        except BaseException as error:
            if writing.refused(error):
                for path, when in written_at().items():
                    if before.get(path) != when:
                        remove(path)
            raise


def declare_dtype(directory: Path) -> None:
    """Let a saved ``config.json`` say a type that holds every saved weight: a plain load then rounds none.

    ``save_pretrained`` of transformers 5.24 writes the type of the first parameter in memory. That may be a
    frozen one in bfloat16 beside trained ones in float32, to which ``from_pretrained`` would round them; or
    float32 where DeepSpeed has saved its own weights of 16 bits.

    Args:
        directory: That of a model. One of an adapter has no ``config.json``, and stays as it is.
    """
    path = directory / "config.json"
    if not path.is_file():
        return
    found: set[torch.dtype] = set()
    for one in weight_files(str(directory)):
        with safe_open(one, framework="pt") as file:
            found |= {str_to_torch_dtype[file.get_slice(key).get_dtype()] for key in file.keys()}  # noqa: SIM118
    types = [dtype for dtype in found if dtype.is_floating_point]
    if types:
        config = json.loads(path.read_text(encoding="utf-8"))
        # The smallest type that holds all of them.
        set_type(config, str(reduce(torch.promote_types, types)).removeprefix("torch."))
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
