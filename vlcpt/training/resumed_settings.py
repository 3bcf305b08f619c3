"""Which settings a resumed run takes from its checkpoint, and which from the configuration.

The optimizer's state brings its own learning rates, weight decay and betas, and the scheduler's state the
learning rates that it starts from; all else is the configuration's. What holds is read off the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from vlcpt.config import CPTConfig

Groups = Sequence[Mapping[str, object]]

# Settings that change what a run learns, and that it takes from the configuration also after a resume. What
# would make it another run is refused instead, see identity.py.
_OF_CONFIGURATION = (
    *("num_train_epochs", "max_steps", "warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
    *("max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("tf32", "metric_for_best_model", "greater_is_better"),
)
_RATES = {
    "language": "learning_rate",
    "vision": "vision_learning_rate",
    "merger": "merger_learning_rate",
    "embeddings": "embedding_learning_rate",
}
_NAMES = {"eps": "adam_epsilon"}
# Of a group: what is no setting, or only how a step is computed.
_PASSED_OVER = ("params", "name", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable")


def saved_settings(model: nn.Module, args: TrainingArguments) -> dict[str, object]:
    """The settings to keep in a checkpoint, so that a resume can say which have changed; JSON only.

    Example:
        >>> saved_settings(nn.Linear(1, 1), CPTConfig("out", use_cpu=True, max_steps=7))["max_steps"]
        7
    """
    found: dict[str, object] = {}
    for name in _OF_CONFIGURATION:
        value = getattr(args, name)
        found[name] = getattr(value, "value", value)
    if isinstance(model, PeftModel):
        found["lora_dropout"] = getattr(model.peft_config[model.active_adapter], "lora_dropout", None)
    return found


def settings_of(groups: Groups) -> list[dict[str, object]]:
    """The settings in an optimizer's groups, to be compared with later ones.

    Example:
        >>> settings_of([{"params": [], "lr": 0.1, "weight_decay": 0.0}])
        [{'lr': 0.1, 'weight_decay': 0.0}]
    """
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def resumed_lines(
    args: CPTConfig,
    configured: Groups,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, object],
    now: Mapping[str, object],
) -> list[str]:
    """One line for each setting in which checkpoint and configuration differ: both values, and which is used.

    Args:
        args: Of the run.
        configured: The optimizer's groups before the checkpoint was loaded into it.
        optimizer: As it is now.
        saved: What :func:`saved_settings` gave when the checkpoint was saved; empty of older ones.
        now: What it gives now.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD([{"params": layer.parameters(), "lr": 0.5, "name": "language"}])
        >>> args = CPTConfig("out", use_cpu=True, learning_rate=0.1)
        >>> configured = [{**optimizer.param_groups[0], "lr": 0.1}]
        >>> resumed_lines(args, configured, optimizer, {}, {})
        ["learning_rate: 0.5 in the checkpoint, 0.1 in the configuration: the checkpoint's is used"]
    """
    lines: dict[str, str] = {}
    rates: set[tuple[object, object]] = set()
    for group, actual in zip(configured, optimizer.param_groups, strict=False):
        key = _RATES.get(str(group.get("name")), "learning_rate")
        pair = (_rate(actual), group["lr"])
        # A tower without a rate of its own has that of the language tower: it is said once.
        if getattr(args, key) is None and ("learning_rate" in lines or key == "learning_rate"):
            key = "learning_rate" if pair in rates else key
        if pair[0] != pair[1]:
            rates.add(pair)
            lines.setdefault(key, _line(key, *pair, "checkpoint"))
        for name, is_used, asked in _others(group, actual):
            if is_used != asked:
                lines.setdefault(name, _line(name, is_used, asked, "checkpoint"))
    for name in saved.keys() & now.keys():
        if saved[name] != now[name]:
            lines[name] = _line(name, saved[name], now[name], "configuration")
    return [lines[name] for name in sorted(lines)]


def _rate(group: Mapping[str, object]) -> object:
    """The learning rate that the schedule starts from, not what it has come to."""
    found = group.get("initial_lr", group["lr"])
    return found.item() if isinstance(found, torch.Tensor) else found


def _others(group: Mapping[str, object], actual: Mapping[str, object]) -> list[tuple[str, object, object]]:
    """Name, value in use and value asked for, of what a group has besides its learning rate."""
    found: list[tuple[str, object, object]] = []
    for key, asked in group.items():
        if key in _PASSED_OVER or key not in actual:
            continue
        is_used = actual[key]
        if key == "betas" and isinstance(asked, Sequence) and isinstance(is_used, Sequence):
            found += [(f"adam_beta{n}", *both) for n, both in enumerate(zip(is_used, asked, strict=True), 1)]
        else:
            found.append((_NAMES.get(key, key), is_used, asked))
    return found


def _line(name: str, saved: object, configured: object, winner: str) -> str:
    return (
        f"{name}: {_told(saved)} in the checkpoint, {_told(configured)} in the configuration: "
        f"the {winner}'s is used"
    )


def _told(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
