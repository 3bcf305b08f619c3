"""What a step must do: the same however it is divided, fast or plain, frozen or trained, resumed or not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import xxhash
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlcpt.data.dataset import CPTDataset
from vlcpt.model.tuning import base_model, trained_towers
from vlcpt.report.doctor import Line, compact, judged
from vlcpt.runs.doctor.plain import (
    FLOOR,
    Gradients,
    exact_products,
    gradients_alone,
    kept_gradients,
    narrow_weights,
    plain_errors,
    sampled,
    worst_gradient,
)
from vlcpt.runs.doctor.subject import Subject, release
from vlcpt.training.guards import converted_type, engine_stage
from vlcpt.training.ranks import on_any_rank, together
from vlcpt.training.trainer import CPTTrainer

_STEPS, _SAVED = 3, 2  # of a run that is resumed, and where it was saved


@dataclass(frozen=True)
class FastPath:
    """A way that is faster than the plain one and must not be another.

    Args:
        name: What it is.
        key: The key of the configuration that turns it off.
        value: And the value.
    """

    name: str
    key: str
    value: object


FAST_PATHS: tuple[FastPath, ...] = (
    FastPath("attention by documents", "attn_implementation", "sdpa"),
    FastPath("loss in chunks", "loss_chunk", 0),
    FastPath("pixels as bytes", "pixel_bytes", False),
    FastPath("patch embedding", "patch_embedding", "conv"),
    FastPath("activation checkpointing", "activation_checkpointing", False),
)
_MODEL_KEYS = ("attn_implementation",)


class Gradient(TrainerCallback):
    """Keeps the gradient of a step as the optimizer gets it, whatever the engine.

    Attributes:
        found: By name; empty before a step.
    """

    def __init__(self) -> None:
        self.found: Gradients = {}
        self.trainer: CPTTrainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """DeepSpeed steps inside its backward pass, and no callback is asked."""
        engine = self.trainer.model_wrapped
        if engine_stage(engine) is None:
            return
        step: Callable[..., object] = engine.step  # type: ignore[assignment]

        def look_and_step(*given: object, **named: object) -> object:
            if engine.is_gradient_accumulation_boundary():  # type: ignore[operator]
                self.found = _engine_gradients(engine.module)  # type: ignore[arg-type]
            return step(*given, **named)

        engine.step = look_and_step  # type: ignore[assignment]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if engine_stage(self.trainer.model_wrapped) is None:
            scaler = self.trainer.accelerator.scaler
            self.found = kept_gradients(self.trainer.model, 1.0 if scaler is None else scaler.get_scale())


def _engine_gradients(module: nn.Module) -> Gradients:
    from deepspeed.utils import safe_get_full_grad

    named = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    return {name: sampled(safe_get_full_grad(one)) for name, one in named}


@dataclass(frozen=True)
class Step:
    """The first step of a training: its loss and gradient."""

    loss: float
    gradients: Gradients


def first_step(
    subject: Subject,
    name: str,
    dataset: CPTDataset,
    rows: int,
    accumulation: int,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    change: Callable[[nn.Module], None] | None = None,
    **changes: object,
) -> Step:
    """Train one step with a learning rate of 0, in so many batches of so many rows.

    Args:
        change: Called with the model before the trainer is made.
        changes: Keys of the configuration.
    """
    of_model = {key: changes.pop(key) for key in _MODEL_KEYS if key in changes}
    args = subject.settings(
        name,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        packing=dataset.packing,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        **changes,
    )
    seen = Gradient()
    trainer = subject.trainer(args, dataset, [seen, *callbacks], change, lora_dropout=0.0, **of_model)
    seen.trainer = trainer
    trainer.train()
    loss = next(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    found = Step(loss, seen.found)
    del trainer, seen
    release()
    return found


@dataclass(frozen=True)
class Reference:
    """What one step should have, and how far the plain path is off in the run's own type.

    Args:
        loss, gradients: In float32.
        loss_error: That of the plain path, relative: of all documents, for errors of some cancel those of
            others by chance.
        errors: For each of its gradients, relative; both at most, by two attention kernels.
    """

    loss: float
    gradients: Gradients
    loss_error: float
    errors: Mapping[str, float]


def reference(subject: Subject) -> Reference:
    """The documents of ``singles`` one by one, in float32 and as rounded as the run; computed once."""
    kept = vars(subject).get("_reference")
    if isinstance(kept, Reference):
        return kept
    run = partial(
        gradients_alone, samples=subject.with_pixels(subject.samples(subject.singles)), device=subject.device
    )
    with exact_products():
        parts, gradients = run(subject.placed(dtype="float32", attn_implementation="eager"), autocast=None)
    release()
    # DeepSpeed holds the weights in 16 bits, and with them what is between layers; autocast does neither.
    held = converted_type(subject.training)
    loss, off, rounded = sum(parts), 0.0, []
    for kernel in ("sdpa", "eager"):
        model = subject.placed(attn_implementation=kernel)
        if held is not None:
            narrow_weights(model, held)
        near, found = run(model, autocast=subject.autocast if held is None else None)
        off = max(off, sum(abs(one - exact) for one, exact in zip(near, parts, strict=True)))
        rounded.append(found)
        del model
        release()
    plain = Reference(loss, gradients, off / abs(loss), plain_errors(rounded, gradients))
    vars(subject)["_reference"] = plain
    return plain


def any_split(subject: Subject, name: str) -> Line:
    """Loss and gradient of one step of four packs a rank, in one batch, in two and in four."""
    plain = reference(subject)
    splits = [(4, 1), (2, 2), (1, 4)]
    steps = [first_step(subject, f"split-{rows}", subject.packs, rows, count) for rows, count in splits]
    measured = tolerance = 0.0
    cause = ""
    for (rows, count), step in zip(splits[1:], steps[1:], strict=True):
        error, most, what = difference(step, plain, steps[0])
        if not tolerance or not error / most <= measured / tolerance:
            measured, tolerance = error, most
            cause = (
                f"with batches of {rows} and accumulation {count} the {what} of a step is off "
                f"by {error:.1e} from that of one batch of 4: it depends on how it is divided. Report it."
            )
    return judged(name, measured, tolerance, cause=cause, detail="4×1, 2×2 and 1×4")


def fast_as_plain(subject: Subject, name: str) -> Line:
    """Loss and gradient of a step on the fast paths against documents one by one on the plain one."""
    plain = reference(subject)
    measured, tolerance, what = difference(fast_step(subject), plain)
    cause = ""
    if on_any_rank(not measured <= tolerance):  # each rank takes part in the search
        cause = (
            f"the {what} of a step is off by {measured:.1e} from that of the plain path. "
            f"{_culprit(subject, plain)}"
        )
    paths = ", ".join(path.name for path in FAST_PATHS)
    return judged(name, measured, tolerance, cause=cause, detail=paths)


def one_batch(subject: Subject, name: str, **changes: object) -> Step:
    """The step of the documents of ``singles``, in one batch a rank."""
    rows = len(subject.singles) // subject.ranks
    return first_step(subject, name, subject.singles, rows, 1, **changes)  # type: ignore[arg-type]


def fast_step(subject: Subject) -> Step:
    """The same on the paths that the run takes; computed once."""
    kept = vars(subject).get("_fast_step")
    if isinstance(kept, Step):
        return kept
    vars(subject)["_fast_step"] = found = one_batch(subject, "fast")
    return found


def difference(
    step: Step, plain: Reference, right: Step | Reference | None = None
) -> tuple[float, float, str]:
    """Error, what it may be, and of what: that of loss or gradient which is worse.

    Args:
        plain: Says what rounding does.
        right: What the step should be; None: ``plain``.
    """
    right = plain if right is None else right
    worst = worst_gradient(step.gradients, right.gradients, plain.errors)
    loss, allowed = abs(step.loss - right.loss) / abs(right.loss), 2 * plain.loss_error + FLOOR
    if not loss / allowed <= worst.error / worst.allowed:
        return loss, allowed, "loss"
    return worst.error, worst.allowed, f"gradient of {worst.name}"


def _culprit(subject: Subject, plain: Reference) -> str:
    """Which of the fast paths is wrong: with it turned off the step is right."""
    for number, path in enumerate(FAST_PATHS):
        step = one_batch(subject, f"off-{number}", **{path.key: path.value})
        measured, tolerance, _ = difference(step, plain)
        if measured <= tolerance:
            return (
                f"With {path.key}: {str(path.value).lower()} it is right: use that, and report {path.name}."
            )
    return "It is so with each of the fast paths turned off. Report it."


class AroundSteps(TrainerCallback):
    """Looks at the model before the first step, when its engine has converted it, and after the last."""

    def begin(self, model: nn.Module) -> None:
        """Before the first step."""

    def end(self, model: nn.Module) -> None:
        """After the last."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        assert model is not None
        self.begin(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        assert model is not None
        self.end(model)


class Frozen(AroundSteps):
    """Notes what changes of weights that do not train, and backward passes of towers that need none.

    Attributes:
        moved: Names of the weights that changed.
        backward: Forward passes of a frozen tower of which gradients were to be kept.
        passes: Forward passes of the vision tower.
        count: Weights that do not train.
    """

    def __init__(self) -> None:
        self.moved: list[str] = []
        self.backward = self.passes = self.count = 0
        self._before: dict[str, str] = {}

    def begin(self, model: nn.Module) -> None:
        """Keep digests, and count forward passes from here on."""
        self._before = frozen_digests(model)
        self.count = len(self._before)
        trained = trained_towers(model)
        visual = base_model(model).model.visual
        if "vision" not in trained:
            # The first layer of a block: where a block is run again, torch stops before its end.
            visual.blocks[-1].norm1.register_forward_hook(self._note)
            if "merger" not in trained:
                visual.merger.register_forward_hook(self._note)

    def _note(self, module: nn.Module, given: object, output: object) -> None:
        self.passes += 1
        self.backward += isinstance(output, torch.Tensor) and output.requires_grad

    def end(self, model: nn.Module) -> None:
        """Compare with the digests."""
        after = frozen_digests(model)
        self.moved = [name for name, one in self._before.items() if after.get(name) != one]


def frozen_digests(model: nn.Module) -> dict[str, str]:
    """A digest of each weight that does not train; under ZeRO-3 of this rank's part of it.

    Example:
        >>> layer = nn.Linear(2, 2).requires_grad_(False)
        >>> before = frozen_digests(layer)
        >>> _ = layer.bias.data.add_(1)
        >>> [name for name, one in frozen_digests(layer).items() if one != before[name]]
        ['bias']
    """
    found = {}
    for name, one in model.named_parameters():
        if not one.requires_grad:
            held = getattr(one, "ds_tensor", one).detach().cpu().contiguous()
            found[name] = xxhash.xxh3_128_hexdigest(held.flatten().view(torch.uint8).numpy().data)
    return found


def frozen_untouched(subject: Subject, name: str) -> Line:
    """Weights that do not train, bit for bit before and after; and no backward pass through frozen towers."""
    frozen = Frozen()
    _run(subject, "frozen", [frozen])
    if not frozen.count:
        return Line(name, "not run", detail="all weights train")
    cause = []
    if frozen.moved:
        cause.append(f"{len(frozen.moved)} weights that do not train have changed, first {frozen.moved[0]}.")
    if frozen.backward:
        cause.append(
            f"{frozen.backward} of {frozen.passes} forward passes of the frozen vision tower keep what a "
            "backward pass needs, which costs time and memory for nothing."
        )
    passes = f", {frozen.passes} forward passes of a frozen tower" if frozen.passes else ""
    return judged(
        name,
        len(frozen.moved) + frozen.backward,
        0,
        cause=" ".join([*cause, "Report it."]),
        detail=f"{frozen.count:,} weights{passes}",
    )


class Weights(AroundSteps):
    """Keeps what trains, of this rank: before the first step and after the last."""

    def __init__(self) -> None:
        self.before: Gradients = {}
        self.after: Gradients = {}

    def begin(self, model: nn.Module) -> None:
        """Keep what training starts from."""
        self.before = _trained(model)

    def end(self, model: nn.Module) -> None:
        """Keep what training has made of it."""
        self.after = _trained(model)


def _trained(model: nn.Module) -> Gradients:
    return {
        name: sampled(getattr(one, "ds_tensor", one)).clone()
        for name, one in model.named_parameters()
        if one.requires_grad
    }


def _run(subject: Subject, name: str, callbacks: Sequence[TrainerCallback], **changes: object) -> None:
    """A short training on packs, as the run trains."""
    resume = changes.pop("resume", None)
    other_seed = bool(changes.pop("other_seed", False))
    rows = min(2, subject.training.per_device_train_batch_size)
    args = subject.settings(name, per_device_train_batch_size=rows, gradient_accumulation_steps=1,
                            max_steps=_STEPS, lr_scheduler_type="constant", **changes)  # fmt: skip
    trainer = subject.trainer(args, subject.packs, callbacks)
    if other_seed:  # what trains is not what the first run began with: it must come from the checkpoint
        with torch.no_grad():
            for one in trainer.model.parameters():
                if one.requires_grad and not hasattr(one, "ds_id"):
                    one.add_(torch.randn_like(one) * 0.01)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    del trainer
    release()


def resumed_as_uninterrupted(subject: Subject, name: str) -> Line:
    """A run that is saved, deleted and resumed against two that are not interrupted."""
    first, second, resumed = Weights(), Weights(), Weights()
    folder = subject.folder / "uninterrupted"
    saves = {"save_strategy": "steps", "save_steps": _SAVED}
    _run(subject, "uninterrupted", [first], **saves)
    _run(subject, "again", [second])
    checkpoint = folder / f"checkpoint-{_SAVED}"
    _run(subject, "uninterrupted", [resumed], resume=checkpoint, other_seed=True, **saves)
    together(lambda: None)  # no rank removes what another one reads
    if subject.training.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
    spread = _apart(first.after, second.after, first.before)
    measured = min(_apart(resumed.after, one.after, first.before) for one in (first, second))
    # On the CPU two runs are equal to the bit; a GPU may add in another order, this time or the next.
    tolerance = 2 * spread + (0.0 if subject.device.type == "cpu" else FLOOR)
    cause = (
        f"after a resume the weights are off by {measured:.1e} of what training moved them by; two runs "
        f"without one differ by {spread:.1e}. Something was not saved or not restored. Report it."
    )
    return judged(name, measured, tolerance, cause=cause, detail=f"two uninterrupted runs: {compact(spread)}")


def _apart(one: Gradients, other: Gradients, start: Gradients) -> float:
    """How far two results lie apart, relative to how far training has moved."""
    if one.keys() != other.keys():
        return float("inf")
    moved = sum(float((one[name] - start[name]).square().sum()) for name in one) ** 0.5
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
    return apart / moved if moved else float("inf")


def remove(folder: Path) -> None:
    """Delete what doctor wrote."""
    shutil.rmtree(folder, ignore_errors=True)
