"""Numbers that go wrong stop a run, before they get into weights that are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.model.finite_weights import first_not_finite, tensors_of

if TYPE_CHECKING:
    from transformers import Trainer

_SHOWN = 20  # documents in a message


class NotFiniteError(ValueError):
    """A loss, a gradient or a weight is infinite or not a number."""


class FiniteNumbers(TrainerCallback):
    """Looks at all weights before step 1, the loss of each micro-batch and the gradient's norm of each step.

    A loss that is not finite makes every gradient NaN, so the norm alone tells each rank what any rank saw:
    it costs one look at the device a step, and no collective. DeepSpeed steps inside its backward, so there
    ranks agree on the losses before the last backward of a step, and a gradient is seen right after.

    Args:
        trainer: Whose numbers they are.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._documents: list[list[str]] = []
        self._losses: list[torch.Tensor] = []
        self._norm: torch.Tensor | float | None = None
        clip = trainer.accelerator.clip_grad_norm_

        def clip_and_note(
            parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2
        ) -> torch.Tensor | float | None:
            self._norm = clip(parameters, max_norm, norm_type)
            return self._norm

        # Trainer asks for the norm before each step and tells no callback; after clipping it is gone.
        trainer.accelerator.clip_grad_norm_ = clip_and_note

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Look at all weights, so that no document is blamed for what came with them.

        Raises:
            NotFiniteError: With the first name.
        """
        if model is not None and (name := first_not_finite(tensors_of(model))) is not None:
            raise NotFiniteError(
                f"{name} is not finite before step {state.global_step + 1}, so no document can be trained "
                "on. Look at the files that the model was loaded from, or what changed it since."
            )

    def start_step(self, documents: Sequence[list[str]]) -> None:
        """Note the documents of each micro-batch that this rank is about to use."""
        self._documents, self._losses, self._norm = list(documents), [], None

    def watched(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of a micro-batch; one that is not finite has only NaN gradients.

        Raises:
            NotFiniteError: Under DeepSpeed, if a loss of this step is not finite on any rank.
        """
        value = loss.detach()
        self._losses.append(value)
        accelerator = self._trainer.accelerator
        if self._trainer.is_deepspeed_enabled and accelerator.sync_gradients:
            is_bad = ~torch.stack(self._losses).isfinite().all()
            if accelerator.reduce(is_bad.float(), "sum"):
                self._stop(self._bad_losses())
        # For every finite number this is times exactly 1.
        return loss * (value - value + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Look at the norm, which is the same on all ranks."""
        norm = self._norm
        if norm is None or _is_finite(float(norm)):
            return
        bad = self._bad_losses()
        if not any(bad) and self._scales_losses():
            return  # the scaler was too large: it skips the step, and is made smaller
        self._stop(bad)

    def _scales_losses(self) -> bool:
        """Whether 16-bit gradients are scaled, and may overflow."""
        if self._trainer.is_deepspeed_enabled:
            config = getattr(self._trainer.args, "hf_deepspeed_config", None)
            return config is not None and config.get_value("fp16.enabled", False) is True
        return self._trainer.accelerator.scaler is not None

    def _bad_losses(self) -> list[str]:
        """What each rank says of its losses that are not finite; empty for one without any."""
        rank = self._trainer.args.process_index
        found = []
        for number, loss in enumerate(self._losses):
            if not bool(loss.isfinite()):
                documents = self._documents[number] if number < len(self._documents) else []
                found.append(f"the loss is {float(loss)} on rank {rank}, of {_named(documents)}")
        return _everywhere(self._trainer, "; ".join(found))

    def _stop(self, bad: Sequence[str]) -> None:
        reason = "; ".join(filter(None, bad))
        if not reason:
            mine = _named([name for names in self._documents for name in names])
            everyone = _everywhere(self._trainer, mine)
            reason = f"the gradient is not finite, of {'; '.join(everyone)}"
        raise NotFiniteError(
            f"step {self._trainer.state.global_step + 1}: {reason}. Nothing of this step is saved. Look at "
            "these documents (vlcpt inspect), at the learning rates and at dtype. The last checkpoint is of "
            "an earlier step."
        )


def require_finite(model: nn.Module) -> None:
    """Raise if a weight that trains is not finite: such a model must not be saved.

    Raises:
        NotFiniteError: With the first name.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> _ = layer.bias.data.fill_(float("inf"))
        >>> require_finite(layer)
        Traceback (most recent call last):
        vlcpt.training.finite.NotFiniteError: bias is not finite, so this model is not saved. ...
    """
    # Under ZeRO-3 a rank holds a part of each.
    trained = [
        (name, getattr(one, "ds_tensor", one)) for name, one in model.named_parameters() if one.requires_grad
    ]
    if not trained:
        return
    finite = torch.stack([one.detach().isfinite().all() for _, one in trained])
    if not bool(finite.all()):
        name = trained[int((~finite).nonzero()[0])][0]
        raise NotFiniteError(
            f"{name} is not finite, so this model is not saved. Lower the learning rate, and go on from the "
            "last checkpoint with --resume_from_checkpoint true."
        )


def _is_finite(norm: float) -> bool:
    return math.isfinite(norm) and norm >= 0  # DeepSpeed 0.19 gives -1 for one that is not


def _everywhere(trainer: Trainer, text: str) -> list[str]:
    return gather_object([text]) if trainer.args.world_size > 1 else [text]


def _named(documents: Sequence[str]) -> str:
    if not documents:
        return "documents that have no name"
    more = len(documents) - _SHOWN
    return ", ".join(documents[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
