"""Bytes that a forward pass keeps for the backward pass, from the shapes of the layers alone.

Each term was told from the tensors that autograd saves (tests/report/test_memory.py compares). A release
of transformers or peft that keeps others fails there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

How = Literal["frozen", "lora", "full"]
# "documents": by their bounds and without a mask, as flash attention also does.
Attention = Literal["documents", "sdpa", "eager"]


@dataclass(frozen=True)
class TowerShape:
    """The blocks of a tower.

    Args:
        layers: Blocks.
        hidden, intermediate: Width of the hidden states, and inside the MLP.
        heads: Attention heads.
        kv_width: Width of all keys of a token, and of all values.
        linear: Numbers in the matrices of one block.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_width: int
    linear: int


@dataclass(frozen=True)
class Precision:
    """Bytes of one number, by where it stands.

    Args:
        hidden: In the hidden states between layers.
        compute: In matrix products and attention.
        adapter: In the adapters' weights.
        autocast: Products are cast, weights and hidden states are not.
    """

    hidden: int
    compute: int
    adapter: int
    autocast: bool


def language_layer(
    shape: TowerShape,
    how: How,
    precision: Precision,
    tokens: int,
    *,
    attention: Attention,
    masked: bool,
    rank: int = 0,
    dropout: bool = False,
) -> int:
    """Bytes that one decoder layer keeps for ``tokens`` tokens of one row.

    For each token, with h hidden, i intermediate, k the width of the keys, H heads, and c bytes a number in
    products: norms 8h; attention c(2h + 2k) + 4H (with sdpa and a mask of packed documents c(4h + tokens),
    because keys are repeated and every layer keeps a mask of its own; eager 3hc + 6H·tokens or
    4H·tokens); MLP 3ic; inputs of layers that learn; and once a layer what ``cast_weights`` says.

    Args:
        masked: A row holds several documents, so that sdpa and eager attention need a mask.
        rank: Of the adapters.
        dropout: Whether adapters drop some of their input.

    Example:
        >>> shape = TowerShape(1, 256, 640, 4, 128, 10 * 256 * 256 + 256 * 128)
        >>> bfloat16 = Precision(2, 2, 4, autocast=False)
        >>> language_layer(shape, "frozen", bfloat16, 256, attention="sdpa", masked=True) // 256
        8472
    """
    h, i, c = shape.hidden, shape.intermediate, precision.compute
    token = 8 * h + 8 + 3 * i * c
    if attention == "eager":
        # The softmax is float32, with a copy where products are not. The result: where it is learnt from.
        kept = how == "full" or (how == "lora" and _shared(precision, dropout))
        token += (3 + kept) * h * c + shape.heads * tokens * (4 if c == 4 else 4 + c)
    elif attention == "sdpa" and masked:
        token += (4 * h + tokens) * c + 4 * shape.heads
    else:
        # Documents one by one are joined again; a kernel for all of them keeps the result once.
        kept = how == "full" or (how == "lora" and _shared(precision, dropout))
        token += ((2 + kept) * h + 2 * shape.kv_width) * c + 4 * shape.heads
    if how == "full":
        token += 2 * h * precision.hidden  # normed, for the norms' own weights
        token += (5 if precision.hidden != c else 2) * h * c + i * c
    elif how == "lora":
        token += _adapter_inputs(6, 2, h, i, precision, dropout) + 7 * rank * _products(precision)
    adapters = rank * (9 * h + 2 * shape.kv_width + 3 * i)
    return tokens * token + cast_weights(shape, how, precision, adapters)


def vision_layer(
    shape: TowerShape, how: How, precision: Precision, patches: int, *, rank: int = 0, dropout: bool = False
) -> int:
    """Bytes that one vision block keeps for ``patches`` patches; nothing where the tower is frozen.

    As in the language tower, but queries, keys and values come from one product, which stays as a whole
    because the values are a part of it, and images are joined again after attention.

    Example:
        >>> shape = TowerShape(1, 160, 420, 4, 160, 4 * 160 * 160 + 3 * 160 * 420)
        >>> vision_layer(shape, "frozen", Precision(2, 2, 4, autocast=False), 256)
        0
    """
    if how == "frozen":
        return 0
    h, i, c = shape.hidden, shape.intermediate, precision.compute
    patch = 8 * h + 8 + 3 * i * c + 6 * h * c + 4 * shape.heads
    if how == "full":
        # Autocast makes the patches' embedding, hence the hidden states, narrow; the norms widen them.
        patch += 2 * h * c + (4 if precision.autocast else 3) * h * c + i * c
    else:
        patch += _adapter_inputs(4, 3, h, i, precision, dropout) + 5 * rank * _products(precision)
    return patches * patch + cast_weights(shape, how, precision, rank * (9 * h + 3 * i))


def _products(precision: Precision) -> int:
    """Bytes of a number in an adapter's products."""
    return precision.compute if precision.autocast else precision.adapter


def _adapter_inputs(
    layers: int, distinct: int, hidden: int, intermediate: int, precision: Precision, dropout: bool
) -> int:
    """What the adapters of a block keep of their inputs, for one token.

    peft casts the input of each of the ``layers`` to the adapter's type, so that each keeps a copy; only
    where that is no change do those of the same input share it.
    """
    width = _products(precision)
    if _shared(precision, dropout):
        return (distinct * hidden + intermediate) * width
    return (layers * hidden + intermediate) * (width + dropout)


def _shared(precision: Precision, dropout: bool) -> bool:
    """Whether adapters of the same input keep it once."""
    return not precision.autocast and precision.compute == precision.adapter and not dropout


def cast_weights(shape: TowerShape, how: How, precision: Precision, adapters: int = 0) -> int:
    """The copies that autocast makes of a layer's float32 matrices; bfloat16 ones need none.

    Example:
        >>> shape = TowerShape(1, 256, 640, 4, 128, linear=1000)
        >>> cast_weights(shape, "full", Precision(4, 2, 4, autocast=True))
        2000
    """
    if not precision.autocast:
        return 0
    is_float32 = precision.hidden == 4 or how == "full"
    return (shape.linear * is_float32 + adapters * (how == "lora")) * precision.compute
