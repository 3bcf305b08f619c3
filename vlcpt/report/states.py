"""What weights, gradients and the optimizer take on one device, sharded by DeepSpeed or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlcpt.report.activations import Attention, How

# NF4 with double quantisation: 4 bits a weight, 8 for each 64 of them, 32 for each 256 of those.
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes a trained parameter in the optimizer's state, by the beginning of its name; AdamW's 8 for all others.
OPTIMIZER_BYTES = {"adamw_bnb_8bit": 2.1, "adamw_8bit": 2.1, "paged_": 0.0, "lion_8bit": 1.1, "lion": 4.0}
OPTIMIZER_BYTES |= {"sgd": 0.0, "adafactor": 0.1, "adagrad": 4.0, "rmsprop": 4.0}


@dataclass(frozen=True)
class TowerParameters:
    """Parameters of a tower.

    Args:
        how: How it trains.
        frozen: Those that do not train.
        trained: Those that do: its own, copies of them, or its adapters'.
        packed: Of the frozen ones, those held in 4 bits.
        trained_head: Of the trained ones, those of the output layer.
    """

    how: How
    frozen: int
    trained: int
    packed: int = 0
    trained_head: int = 0


@dataclass(frozen=True)
class Setup:
    """How training runs.

    Args:
        weight_bytes: Of a frozen weight: 2 or 4.
        autocast: Products in bfloat16 or float16 while weights stay (``bf16: true`` without DeepSpeed).
        checkpointing: Activations are computed again instead of kept.
        attention: Its kernel.
        masked: A row holds several documents.
        optimizer: ``optim`` of the configuration.
        accumulates: Several forward passes make a step, so that gradients wait for the next one.
        rank, dropout: Of the adapters.
        devices: Processes that share the work.
        stage: DeepSpeed's; None without DeepSpeed.
        narrow: DeepSpeed holds everything in two bytes, with float32 masters (``bf16: true``).
        offload_optimizer, offload_weights: To the computer's own memory.
        bucket: Numbers that DeepSpeed collects before it reduces them.
        live: Numbers of gathered weights that ZeRO-3 keeps at most.
    """

    weight_bytes: int = 2
    autocast: bool = False
    checkpointing: bool = True
    attention: Attention = "sdpa"
    masked: bool = True
    optimizer: str = "adamw_torch"
    accumulates: bool = False
    rank: int = 16
    dropout: bool = False
    devices: int = 1
    stage: int | None = None
    narrow: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 200_000_000
    live: int = 1_000_000_000


def weight_bytes(towers: Mapping[str, TowerParameters], setup: Setup) -> tuple[int, int]:
    """Bytes of all weights on a device, and of those that ZeRO-3 gathers for a while.

    Example:
        >>> weight_bytes({"language": TowerParameters("lora", frozen=1000, trained=10)}, Setup())
        (2040, 0)
    """
    narrow = setup.stage is not None and setup.narrow
    held = 0.0
    for tower in towers.values():
        plain = tower.frozen - tower.packed
        held += plain * (2 if narrow else setup.weight_bytes) + tower.packed * FOUR_BITS
        held += tower.trained * (2 if narrow else 4)
    if setup.stage != 3:
        return round(held), 0
    numbers = sum(tower.frozen + tower.trained for tower in towers.values())
    gathered = held / max(numbers, 1) * min(numbers, setup.live)
    # On one device DeepSpeed gathers copies all the same.
    return round(0 if setup.offload_weights else held / setup.devices), round(gathered)


def gradient_bytes(trained: int, setup: Setup) -> tuple[int, int]:
    """Bytes of all gradients when the backward pass ends, and of what the optimizer's step adds.

    Without DeepSpeed they are float32, and DDP keeps a second copy in the buckets that it sends. ZeRO-1
    keeps them whole, 2 and 3 a part, beside up to two buckets that are being filled and sent. Its step
    makes the part float32.

    Example:
        >>> gradient_bytes(1000, Setup()), gradient_bytes(1000, Setup(devices=2))
        ((4000, 0), (8000, 0))
        >>> gradient_bytes(1000, Setup(devices=4, stage=2, narrow=True))
        (4500, 1000)
    """
    if setup.stage is None:
        return 4 * trained * (2 if setup.devices > 1 else 1), 0
    width = 2 if setup.narrow else 4
    part = -(-trained // setup.devices)
    kept = trained if setup.stage <= 1 else 0 if setup.offload_optimizer else part
    step = 4 * part if setup.narrow and not setup.offload_optimizer else 0
    return width * kept + bucket_bytes(trained, setup), step


def bucket_bytes(trained: int, setup: Setup) -> int:
    """Bytes of the two buckets that DeepSpeed fills with gradients and sends.

    Example:
        >>> bucket_bytes(1000, Setup(stage=2, narrow=True))
        4000
    """
    if setup.stage is None:
        return 0
    return 2 * (2 if setup.narrow else 4) * min(setup.bucket, trained)


def optimizer_bytes(trained: int, setup: Setup) -> int:
    """Bytes of the optimizer's state, and of DeepSpeed's float32 masters.

    Example:
        >>> optimizer_bytes(1000, Setup()), optimizer_bytes(1000, Setup(devices=4, stage=1, narrow=True))
        (8000, 3000)
    """
    if setup.offload_optimizer:
        return 0
    return round(_part(trained, setup) * _state_bytes(setup))


def host_bytes(trained: int, frozen: int, setup: Setup) -> int:
    """Bytes in the computer's own memory for one device: what is offloaded there.

    Example:
        >>> host_bytes(1000, 0, Setup(devices=2, stage=2, narrow=True, offload_optimizer=True))
        8000
    """
    held = 0.0
    if setup.offload_optimizer:  # gradients go there too
        held += _part(trained, setup) * (_state_bytes(setup) + 4)
    if setup.offload_weights:
        held += (trained + frozen) * 2 / setup.devices
    return round(held)


def _part(trained: int, setup: Setup) -> int:
    return -(-trained // setup.devices) if setup.stage else trained


def _state_bytes(setup: Setup) -> float:
    prefixes = [prefix for prefix in OPTIMIZER_BYTES if setup.optimizer.startswith(prefix)]
    state = OPTIMIZER_BYTES[max(prefixes, key=len)] if prefixes else 8.0
    return state + (4 if setup.stage is not None and setup.narrow else 0)
