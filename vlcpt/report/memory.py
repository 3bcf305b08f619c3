"""How much memory a device needs to train, from numbers alone: shapes, parameters, and the largest batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from vlcpt.report import states
from vlcpt.report.activations import How, Precision, TowerShape, cast_weights, language_layer, vision_layer
from vlcpt.report.states import Setup, TowerParameters

Moment = Literal["looking", "learning", "stepping"]

CONTEXT = 2**30  # what CUDA and its libraries take for themselves, about; not in any figure


class VisionConfig(Protocol):
    """What is read of a model's ``vision_config``."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    in_channels: int


class TextConfig(Protocol):
    """What is read of a model's ``text_config``."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


@dataclass(frozen=True)
class ModelShape:
    """The towers of a model, and its ends.

    Args:
        vocabulary: Rows of the output layer.
        patch: Numbers in one patch of pixels.
    """

    language: TowerShape
    vision: TowerShape
    vocabulary: int
    patch: int


@dataclass(frozen=True)
class LargestBatch:
    """What one device sees at most in one forward pass.

    Args:
        rows: Packs, or samples.
        tokens: Of one row, padding included.
        targets: In all rows.
        patches: Of all media in all rows; four make a token.
    """

    rows: int
    tokens: int
    targets: int
    patches: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment that needs most.

    Args:
        moment: ``looking`` (the vision tower's forward), ``learning`` (the start of the backward pass) or
            ``stepping`` (its end, and the optimizer's step).
        weights, gradients, optimizer, activations, logits, inputs: On the device then.
        host: In the computer's own memory for this device, if something is offloaded.
    """

    moment: Moment
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    inputs: int
    host: int = 0

    @property
    def total(self) -> int:
        """All on the device, but for what CUDA takes for itself."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.logits, self.inputs)
        return sum(parts)


def shape_of(text: TextConfig, vision: VisionConfig) -> ModelShape:
    """The shape of a Qwen2.5-VL model from its ``config.json``.

    Example:
        >>> from types import SimpleNamespace as Config
        >>> text = Config(num_hidden_layers=36, hidden_size=2048, intermediate_size=11008,
        ...               num_attention_heads=16, num_key_value_heads=2, vocab_size=151936)
        >>> vision = Config(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
        ...                 temporal_patch_size=2, in_channels=3)
        >>> shape_of(text, vision).patch
        1176
    """
    h, i = text.hidden_size, text.intermediate_size
    k = h // text.num_attention_heads * text.num_key_value_heads
    v, w = vision.hidden_size, vision.intermediate_size
    language = TowerShape(
        text.num_hidden_layers, h, i, text.num_attention_heads, k, 2 * h * h + 2 * h * k + 3 * h * i
    )
    return ModelShape(
        language=language,
        vision=TowerShape(vision.depth, v, w, vision.num_heads, v, 4 * v * v + 3 * v * w),
        vocabulary=text.vocab_size,
        patch=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
    )


def estimate_memory(
    shape: ModelShape, towers: Mapping[str, TowerParameters], batch: LargestBatch, setup: Setup
) -> MemoryEstimate:
    """The most bytes a device holds at once, and what they are.

    Three moments are compared, each on top of the weights and the optimizer's state:

    - looking: the vision tower's forward pass; where it is frozen, one block's work on all patches;
    - learning: all that the forward passes keep (:mod:`vlcpt.report.activations`; with checkpointing the
      hidden states before each layer and one layer's own), with the logits: 12 bytes × targets × vocabulary
      for the log-softmax, its gradient and that of the logits, or the first layer's work, if that is more;
    - stepping: all gradients, and the work of the last layer, or float32 copies of DeepSpeed's.

    Args:
        towers: ``vision``, ``merger`` and ``language``.

    Example:
        >>> tower = TowerShape(2, 64, 128, 4, 32, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
        >>> shape = ModelShape(tower, tower, vocabulary=1000, patch=1176)
        >>> frozen, full = TowerParameters("frozen", 10_000, 0), TowerParameters("full", 0, 1_000_000)
        >>> towers = {"vision": frozen, "merger": frozen, "language": full}
        >>> estimate_memory(shape, towers, LargestBatch(1, 64, 32, 0), Setup(checkpointing=False)).optimizer
        8000000
    """
    trained = sum(tower.trained for tower in towers.values())
    weights, gathered = states.weight_bytes(towers, setup)
    gradients, at_step = states.gradient_bytes(trained, setup)
    optimizer = states.optimizer_bytes(trained, setup)
    language = _precision(setup, towers["language"].how)
    kept, work = _language(shape, towers["language"].how, batch, setup, language)
    seen, looking = _vision(shape, towers, batch, setup)
    logits = 12 * batch.targets * shape.vocabulary
    head = 4 * (batch.targets * shape.vocabulary + towers["language"].trained_head * (gradients > 0))
    waiting = gradients if setup.accumulates else states.bucket_bytes(trained, setup)
    inputs = batch.patches * shape.patch * (4 + language.compute) + batch.rows * batch.tokens * 60
    inputs += batch.rows * batch.tokens**2 * (setup.masked and setup.attention != "documents")
    moments: dict[Moment, tuple[int, int, int]] = {
        "looking": (waiting, looking + gathered, 0),
        "learning": (waiting, kept + seen + max(work - logits, 0) + gathered, max(logits, head)),
        "stepping": (gradients, max(work + seen + gathered, at_step), 0),
    }
    name = max(moments, key=lambda one: sum(moments[one]))
    now, activations, logits = moments[name]
    host = states.host_bytes(trained, sum(tower.frozen for tower in towers.values()), setup)
    return MemoryEstimate(name, weights, now, optimizer, activations, logits, inputs, host)


def _precision(setup: Setup, how: How) -> Precision:
    if setup.stage is not None and setup.narrow:
        return Precision(2, 2, 2, autocast=False)
    hidden = 4 if how == "full" else setup.weight_bytes
    return Precision(hidden, 2 if setup.autocast else hidden, 4, setup.autocast)


def _language(
    shape: ModelShape, how: How, batch: LargestBatch, setup: Setup, precision: Precision
) -> tuple[int, int]:
    """Bytes that the language tower keeps, and those of one layer's backward pass beside them."""
    tower = shape.language
    layer = batch.rows * language_layer(
        tower,
        how,
        precision,
        batch.tokens,
        attention=setup.attention,
        masked=setup.masked,
        rank=setup.rank,
        dropout=setup.dropout,
    )
    tokens = batch.rows * batch.tokens
    ends = tokens * tower.hidden * (4 + 2 * precision.hidden)
    work = tokens * (4 * tower.hidden + 3 * tower.intermediate) * precision.compute
    if setup.checkpointing:
        # Autocast remembers its copies of trained weights until the forward pass is over.
        casts = cast_weights(tower, how, precision) if how == "full" else 0
        return ends + tower.layers * (tokens * tower.hidden * precision.hidden + casts), layer + work
    return ends + tower.layers * layer, work


def _vision(
    shape: ModelShape, towers: Mapping[str, TowerParameters], batch: LargestBatch, setup: Setup
) -> tuple[int, int]:
    """Bytes that the vision tower and the merger keep, and those at work in the forward pass."""
    tower, how = shape.vision, towers["vision"].how
    precision = _precision(setup, how)
    work = batch.patches * tower.hidden * (28 + 4 * precision.compute)
    if how == "frozen":
        return 0, work
    layer = vision_layer(tower, how, precision, batch.patches, rank=setup.rank, dropout=setup.dropout)
    if setup.checkpointing:
        return tower.layers * batch.patches * tower.hidden * precision.compute, work
    return tower.layers * layer, tower.layers * layer + work
