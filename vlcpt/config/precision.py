"""In which type a run computes: bfloat16 where its GPU has it in hardware, unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments

Precision = Literal["bf16", "fp16", "float32"]

_FIRST_WITH_BF16 = 8  # major compute capability of NVIDIA's Ampere


@dataclass(frozen=True)
class DeviceFacts:
    """The GPUs of a process.

    Args:
        names: One for each GPU that the process sees.
        capabilities: Compute capability of each NVIDIA GPU; for AMD's the numbers mean something else.
        is_hip: Whether they are AMD's, driven by ROCm.
        torch_says: ``torch.cuda.is_bf16_supported(including_emulation=False)``, which is of one GPU alone.

    Example:
        >>> DeviceFacts(("Tesla T4",), ((7, 5),), is_hip=False, torch_says=False).has_bf16
        False
    """

    names: tuple[str, ...] = ()
    capabilities: tuple[tuple[int, int], ...] = ()
    is_hip: bool = False
    torch_says: bool = False

    @property
    def has_bf16(self) -> bool:
        """Whether every GPU has bfloat16 in hardware; False without one."""
        if not self.names or not self.torch_says:
            return False
        return self.is_hip or all(major >= _FIRST_WITH_BF16 for major, _ in self.capabilities)

    @property
    def emulates_bf16(self) -> bool:
        """Whether there is a GPU that has bfloat16 in software alone."""
        return bool(self.names) and not self.has_bf16


def choose_precision(
    facts: DeviceFacts,
    *,
    bf16: bool | None = None,
    fp16: bool = False,
    use_cpu: bool = False,
    launcher: str = "no",
    deepspeed: Mapping[str, object] | None = None,
) -> Precision:
    """The type of products: what was asked for, else bfloat16 where the GPU has it, else float32.

    float16 is never chosen unasked: its largest number is 65,504, and a forward pass that overflows ends
    the run.

    Args:
        facts: The GPUs.
        bf16: As in the configuration; None where it says nothing.
        fp16: As in the configuration.
        use_cpu: Whether no GPU will be used, whatever there is.
        launcher: ``--mixed_precision`` of ``accelerate launch``: ``no``, ``bf16`` or ``fp16``.
        deepspeed: The DeepSpeed configuration; None without one.

    Example:
        >>> a100 = DeviceFacts(("A100",), ((8, 0),), torch_says=True)
        >>> choose_precision(a100), choose_precision(a100, bf16=False)
        ('bf16', 'float32')
        >>> v100 = DeviceFacts(("V100",), ((7, 0),))
        >>> choose_precision(v100), choose_precision(v100, fp16=True)
        ('float32', 'fp16')
    """
    if bf16 is not None or fp16:
        return "bf16" if bf16 else "fp16" if fp16 else "float32"
    sharded = {
        name: section.get("enabled")
        for name, section in with_precision(deepspeed or {}).items()
        if name in ("bf16", "fp16") and isinstance(section, Mapping)
    }
    if sharded.get("bf16") is True or sharded.get("fp16") is True:
        return "bf16" if sharded.get("bf16") is True else "fp16"
    if sharded.get("bf16") is False:
        return "float32"
    if launcher in ("bf16", "fp16"):
        return "bf16" if launcher == "bf16" else "fp16"
    return "bf16" if facts.has_bf16 and not use_cpu else "float32"


def device_facts() -> DeviceFacts:
    """The GPUs that this process sees.

    Example:
        >>> device_facts().is_hip == bool(torch.version.hip)
        True
    """
    is_hip = bool(torch.version.hip)
    numbers = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not numbers:  # ROCm's torch says that bfloat16 is there even without a GPU
        return DeviceFacts(is_hip=is_hip)
    return DeviceFacts(
        names=tuple(torch.cuda.get_device_name(number) for number in numbers),
        capabilities=tuple(torch.cuda.get_device_capability(number) for number in numbers),
        is_hip=is_hip,
        torch_says=torch.cuda.is_bf16_supported(including_emulation=False),
    )


def used_devices(training: TrainingArguments) -> DeviceFacts:
    """The GPUs that a run computes on; none with ``use_cpu``.

    Example:
        >>> from transformers import TrainingArguments
        >>> used_devices(TrainingArguments("out", use_cpu=True)).names
        ()
    """
    return DeviceFacts() if training.use_cpu else device_facts()


def autocast_type(training: TrainingArguments) -> torch.dtype | None:
    """The type that autocast computes in; None for float32.

    Example:
        >>> from transformers import TrainingArguments
        >>> autocast_type(TrainingArguments("out", use_cpu=True, bf16=True))
        torch.bfloat16
    """
    return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None


def with_precision(config: Mapping[str, object]) -> dict[str, object]:
    """A DeepSpeed configuration that takes ``bf16`` and ``fp16`` from the run where it does not name them.

    accelerate would add them later, when it has been asked already in which type DeepSpeed computes.

    Example:
        >>> with_precision({"bf16": {"enabled": True}})
        {'bf16': {'enabled': True}, 'fp16': {'enabled': 'auto'}}
    """
    named = dict(config)
    older = named.pop("bfloat16", None)  # DeepSpeed's older name, which transformers does not look for
    named.setdefault("bf16", older or {"enabled": "auto"})
    named.setdefault("fp16", {"enabled": "auto"})
    return named


def slow_products(training: TrainingArguments) -> str | None:
    """A warning about matrix products that are slow on this GPU; None where they are as fast as they can be.

    Example:
        >>> from transformers import TrainingArguments
        >>> slow_products(TrainingArguments("out", use_cpu=True)) is None
        True
    """
    facts = used_devices(training)
    if not facts.names:
        return None
    name = facts.names[0]
    if training.bf16:
        if facts.has_bf16:
            return None
        return (
            f"bf16 on {name}, which has no bfloat16 in hardware: products are emulated, which is very slow. "
            "Set bf16: false for float32, or fp16: true."
        )
    if training.fp16:
        return None
    if facts.has_bf16:
        faster = "tf32: true rounds their inputs and is faster. " if not training.tf32 else ""
        rounded = " with inputs rounded to TF32" if training.tf32 else ""
        return f"float32 products on {name}{rounded}: slow. {faster}Remove bf16: false for bfloat16."
    return (
        f"float32 products on {name}, which has no bfloat16 in hardware: slow. fp16: true is faster, but "
        "float16 overflows above 65,504, and a loss that is not finite ends the run."
    )
