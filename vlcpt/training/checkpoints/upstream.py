"""Where transformers 5.24 has no public name, or does not what a run needs: each until a test says it may go.

Lines are those of ``transformers/trainer.py`` in 5.24.0.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Trainer


def save_now(trainer: Trainer) -> None:
    """Save a checkpoint between two steps, as Trainer does after one (lines 2285 to 2286).

    May go when a public method saves; tests/test_interrupts_saving.py fails when this one is another.
    """
    assert isinstance(trainer.model, nn.Module)
    trainer._save_checkpoint(trainer.model, trial=None)
    trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def count_lost_step(trainer: Trainer) -> None:
    """Count a step of whose documents none could be read, though nothing is trained in it.

    A resume takes the number of the step for the place in the data. From two numbers more (lines 1644 and
    1649) Trainer counts the steps whose losses it has. May go when Trainer takes an empty step for one;
    tests/training/test_step.py fails when the names change.
    """
    trainer.state.global_step += 1
    trainer._globalstep_last_logged += 1
    trainer._initial_global_step += 1
    if trainer.state.global_step >= trainer.state.max_steps:
        trainer.control.should_training_stop = True


def forget_evaluation_loaders(trainer: Trainer) -> list[object]:
    """Take out the loaders of evaluations, which Trainer keeps with their workers (line 1065).

    May go when Trainer ends them; tests/training/test_trainer.py fails when they are kept elsewhere.
    """
    kept = vars(trainer).pop("_eval_dataloaders", {})
    return list(kept.values())


@contextmanager
def quiet_partial_load() -> Iterator[None]:
    """Silence two of Trainer's warnings on a resume, which are not true here.

    Tensors that it did not load are loaded already; and how often a run saves, logs and evaluates is what its
    configuration says, see :class:`vlcpt.training.checkpoints.callback.Checkpoints`.
    """
    logger = logging.getLogger("transformers.trainer")

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        untrue = ("keys in the checkpoint model loaded", "do not match the ones in")
        return not any(one in message for one in untrue)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextmanager
def without_card(model: nn.Module) -> Iterator[None]:
    """Let PEFT 0.19 write no README.md: it names the base by this machine's path."""
    if not isinstance(model, PeftModel):
        yield
        return
    own = vars(model)  # before what the class has
    own["create_or_update_model_card"] = lambda output_dir: None
    try:
        yield
    finally:
        del own["create_or_update_model_card"]


@contextmanager
def cache_in_saved_config(config: PreTrainedConfig) -> Iterator[None]:
    """Let a saved configuration say ``use_cache``, which is off in training so that packs stay apart.

    Example:
        >>> config = PreTrainedConfig()
        >>> config.use_cache = False
        >>> with cache_in_saved_config(config):
        ...     config.use_cache
        True
        >>> config.use_cache
        False
    """
    both = (config, config.get_text_config())
    before = [one.use_cache for one in both]
    for one in both:
        one.use_cache = True
    try:
        yield
    finally:
        for one, value in zip(both, before, strict=True):
            one.use_cache = value


def loaded_from(model: PreTrainedModel) -> tuple[str, str | None]:
    """The name or path that a model was loaded from, and its commit on the Hub."""
    return model.config._name_or_path, getattr(model.config, "_commit_hash", None)
