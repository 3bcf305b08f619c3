"""A run that goes on from its last step trains none more: a requeued job must not change its result."""

from __future__ import annotations

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class NoStepLeft(TrainerCallback):
    """Ends a resumed run that has all its steps before it trains one.

    Trainer of transformers 5.24 looks at ``max_steps`` only after a step, so that each resume in the middle
    of an epoch would train another one.

    Args:
        console: Where it is said.

    Example:
        >>> args, state = TrainingArguments(output_dir="out", use_cpu=True), TrainerState()
        >>> state.global_step = state.max_steps = 3
        >>> NoStepLeft(Console(width=200)).on_train_begin(args, state, TrainerControl()).should_training_stop
        step 3 of 3 is done: no step is left to train, and the weights stay as they were saved. To train ...
        True
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_finished = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        """Look whether a step is left; before the first one ``CPTTrainer`` asks ``control``."""
        self._is_finished = 0 < state.max_steps <= state.global_step
        if self._is_finished:
            control.should_training_stop = True
            if state.is_world_process_zero:
                self._console.print(
                    f"step {state.global_step} of {state.max_steps} is done: no step is left to train, and "
                    "the weights stay as they were saved. To train on, raise max_steps or num_train_epochs.",
                    highlight=False,
                    soft_wrap=True,
                )
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Let the epoch that has not taken place save and measure nothing."""
        if self._is_finished:
            control.should_save = control.should_evaluate = False
