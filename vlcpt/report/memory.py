"""How much memory a device needs to train, from shapes, parameters and the longest pack alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vlcpt.data.families import Tower
    from vlcpt.model.counting import TowerParameters

How = Literal["frozen", "lora", "full"]


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
class Setup:
    """How training runs.

    Args:
        weight_bytes: Those of a frozen weight: 2 or 4.
        autocast: Products in bfloat16 or float16 while weights stay (``bf16: true`` without DeepSpeed).
        checkpointing: Activations are computed again instead of kept.
        attention: ``sdpa`` and ``eager`` have a mask; all others go by the bounds of documents.
        masked: A row holds several documents.
        optimizer: ``optim`` of the configuration.
        accumulates: Several forward passes make a step, so that gradients wait for the next one.
        rank, dropout, dora: Those of the adapters; DoRA's take their inputs as wide as they are themselves.
        loss_chunk: Targets whose logits are there at once; 0: all.
        devices: Processes that share the work.
        stage: DeepSpeed's; None without DeepSpeed.
        narrow: DeepSpeed holds everything in two bytes, with float32 masters (``bf16: true``).
        offload_optimizer, offload_weights: To the computer's own memory.
        bucket: Numbers that DeepSpeed collects before it reduces them.
        overlaps: It fills one such bucket while it sends another.
        live: Numbers of gathered weights that ZeRO-3 keeps at most.
    """

    weight_bytes: int = 2
    autocast: bool = False
    checkpointing: bool = True
    attention: str = "sdpa"
    masked: bool = True
    optimizer: str = "adamw_torch"
    accumulates: bool = False
    rank: int = 16
    dropout: bool = False
    dora: bool = False
    loss_chunk: int = 128
    devices: int = 1
    stage: int | None = None
    narrow: bool = False
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: int = 200_000_000
    overlaps: bool = True
    live: int = 1_000_000_000

    def hidden(self, how: How) -> int:
        """Bytes of a number in the hidden states between layers."""
        if self.narrow:
            return 2
        return 4 if how == "full" else self.weight_bytes

    def compute(self, how: How) -> int:
        """Bytes of a number in matrix products and attention."""
        return 2 if self.autocast else self.hidden(how)

    @property
    def adapter(self) -> int:
        """Bytes of a number in the adapters' products."""
        return 2 if self.autocast or self.narrow else 4

    @property
    def keeps_inputs(self) -> bool:
        """Whether adapters keep an input of the type of their products itself, and not a copy."""
        return not self.dropout and not (self.autocast and self.dora)

    @property
    def shares_inputs(self) -> bool:
        """Whether the adapters of one input keep it once: it is cast to their type, where that differs."""
        return self.keeps_inputs and self.hidden("lora") == self.adapter


def language_layer(shape: TowerShape, how: How, setup: Setup, tokens: int) -> int:
    """Bytes that one decoder layer keeps for ``tokens`` tokens of one row.

    For each token, with h hidden, i intermediate, k the width of the keys, H heads, and c bytes a number in
    products: norms 8h; attention c(2h + 2k) + 4H (with sdpa and a mask of packed documents c(4h + tokens),
    because keys are repeated and every layer keeps a mask of its own; eager 3hc + 6H·tokens or
    4H·tokens); MLP 3ic; inputs of layers that learn; and once a layer what ``cast_weights`` says.

    Example:
        >>> shape = TowerShape(1, 256, 640, 4, 128, 10 * 256 * 256 + 256 * 128)
        >>> language_layer(shape, "frozen", Setup(), 256) // 256
        8472
    """
    h, i, c = shape.hidden, shape.intermediate, setup.compute(how)
    token = 8 * h + 8 + 3 * i * c
    # The result of attention is kept once where the output layer learns from it.
    kept = how == "full" or (how == "lora" and setup.keeps_inputs and setup.compute(how) == setup.adapter)
    if setup.attention == "eager":
        # The softmax is float32, with a copy where products are not.
        token += (3 + kept) * h * c + shape.heads * tokens * (4 if c == 4 else 4 + c)
    elif setup.attention == "sdpa" and setup.masked:
        token += (4 * h + tokens) * c + 4 * shape.heads
    else:
        # Documents one by one are joined again; a kernel for all of them keeps the result once.
        token += ((2 + kept) * h + 2 * shape.kv_width) * c + 4 * shape.heads
    if how == "full":
        token += 2 * h * setup.hidden(how)  # normed, for the norms' own weights
        token += (5 if setup.hidden(how) != c else 2) * h * c + i * c
    elif how == "lora":
        token += _adapter_inputs(6 - kept, 2, shape, setup) + 7 * setup.rank * setup.adapter
    adapters = setup.rank * (9 * h + 2 * shape.kv_width + 3 * i)
    return tokens * token + cast_weights(shape, how, setup, adapters)


def vision_layer(shape: TowerShape, how: How, setup: Setup, patches: int) -> int:
    """Bytes that one vision block keeps for ``patches`` patches; nothing where the tower is frozen.

    As in the language tower, but queries, keys and values come from one product, which is kept complete
    because the values are a part of it, and images are joined again after attention.

    Example:
        >>> shape = TowerShape(1, 160, 420, 4, 160, 4 * 160 * 160 + 3 * 160 * 420)
        >>> vision_layer(shape, "frozen", Setup(), 256)
        0
    """
    if how == "frozen":
        return 0
    h, i, c = shape.hidden, shape.intermediate, setup.compute(how)
    patch = 8 * h + 8 + 3 * i * c + 6 * h * c + 4 * shape.heads
    if how == "full":
        # Autocast makes the patches' embedding, hence the hidden states, narrow; the norms widen them.
        patch += 2 * h * c + (4 if setup.autocast else 3) * h * c + i * c
    else:
        patch += _adapter_inputs(4, 3, shape, setup) + 5 * setup.rank * setup.adapter
    return patches * patch + cast_weights(shape, how, setup, setup.rank * (9 * h + 3 * i))


def _adapter_inputs(layers: int, distinct: int, shape: TowerShape, setup: Setup) -> int:
    """What the adapters of a block keep of their inputs, for one token.

    The input of each of the ``layers`` is cast to the type of the adapters' products, so that each keeps a
    copy; only where that is no change do those of the same input share it.
    """
    if setup.shares_inputs:
        return (distinct * shape.hidden + shape.intermediate) * setup.adapter
    return (layers * shape.hidden + shape.intermediate) * (setup.adapter + setup.dropout)


def cast_weights(shape: TowerShape, how: How, setup: Setup, adapters: int = 0) -> int:
    """The copies that autocast makes of a layer's float32 matrices; bfloat16 ones need none.

    Example:
        >>> cast_weights(TowerShape(1, 256, 640, 4, 128, linear=1000), "full", Setup(autocast=True))
        2000
    """
    if not setup.autocast:
        return 0
    is_float32 = setup.hidden(how) == 4
    return (shape.linear * is_float32 + adapters * (how == "lora")) * setup.compute(how)


# NF4 with double quantisation: 4 bits a weight, 8 for each 64 of them, 32 for each 256 of those.
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes a trained parameter in the optimizer's state, by the beginning of its name; AdamW's 8 for all others.
OPTIMIZER_BYTES = {"adamw_bnb_8bit": 2.1, "adamw_8bit": 2.1, "paged_": 0.0, "lion_8bit": 1.1, "lion": 4.0}
OPTIMIZER_BYTES |= {"sgd": 0.0, "adafactor": 0.1, "adagrad": 4.0, "rmsprop": 4.0}


def weight_bytes(towers: Mapping[Tower, TowerParameters], setup: Setup) -> tuple[int, int]:
    """Bytes of all weights on a device, and of those that ZeRO-3 gathers temporarily.

    Example:
        >>> from vlcpt.model.counting import TowerParameters
        >>> weight_bytes({"language": TowerParameters("lora", frozen=1000, trained=10)}, Setup())
        (2040, 0)
    """
    frozen, trained = setup.hidden("frozen"), setup.hidden("full")
    held = sum(
        (one.frozen - one.packed) * frozen + one.packed * FOUR_BITS + one.trained * trained
        for one in towers.values()
    )
    if setup.stage != 3:
        return round(held), 0
    numbers = sum(tower.frozen + tower.trained for tower in towers.values())
    gathered = held / max(numbers, 1) * min(numbers, setup.live)
    # On one device DeepSpeed gathers copies all the same.
    return round(0 if setup.offload_weights else held / setup.devices), round(gathered)


def gradient_bytes(trained: int, setup: Setup) -> tuple[int, int]:
    """Bytes of all gradients when the backward pass ends, and of what the optimizer's step adds.

    Without DeepSpeed they are float32, and DDP keeps a second copy in the buckets that it sends. ZeRO-1
    keeps all of them, 2 and 3 a part, beside the buckets that are being filled and sent. Its step
    makes the part float32.

    Example:
        >>> gradient_bytes(1000, Setup()), gradient_bytes(1000, Setup(devices=2))
        ((4000, 0), (8000, 0))
        >>> gradient_bytes(1000, Setup(devices=4, stage=2, narrow=True, bucket=1000))
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
    """Bytes of the buckets that DeepSpeed fills with gradients and sends.

    They are reserved whole, however few gradients there are: one of ZeRO-1 and 2, two where sending overlaps;
    one of ZeRO-3, beside the gradients that are being sent.

    Example:
        >>> bucket_bytes(1000, Setup(stage=2, narrow=True, bucket=5000))
        20000
        >>> bucket_bytes(1000, Setup(stage=3, narrow=True, bucket=5000))
        12000
    """
    if setup.stage is None:
        return 0
    width = 2 if setup.narrow else 4
    if setup.stage == 3:
        return width * (setup.bucket + min(setup.bucket, trained))
    return width * setup.bucket * (2 if setup.overlaps else 1)


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
    return state + 4 * setup.narrow


Moment = Literal["looking", "learning", "stepping"]

CONTEXT = 2**30  # what CUDA and its libraries take for themselves, about; not in any figure


@dataclass(frozen=True)
class ModelShape:
    """The towers of a model, its output layer and its input.

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
        tokens: Those of one row, padding included.
        targets: In all rows.
        patches: Those of all media in all rows; four make a token.
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


def shape_of(text: PreTrainedConfig, vision: PreTrainedConfig) -> ModelShape:
    """The shape of a Qwen2.5-VL model from its ``config.json``.

    Example:
        >>> from transformers import Qwen2_5_VLConfig
        >>> config = Qwen2_5_VLConfig()
        >>> shape_of(config.text_config, config.vision_config).patch
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
    shape: ModelShape, towers: Mapping[Tower, TowerParameters], batch: LargestBatch, setup: Setup
) -> MemoryEstimate:
    """The most bytes a device holds at once, and what they are.

    Three moments are compared, each on top of the weights and the optimizer's state:

    - looking: the vision tower's forward pass; where it is frozen, one block's work on all patches;
    - learning: all that the forward passes keep (:mod:`vlcpt.report.memory`; with checkpointing the
      hidden states before each layer and one layer's own), with what :func:`logit_bytes` says of the
      logits, or the first layer's work, if that is more;
    - stepping: all gradients, and the work of the last layer, or float32 copies of DeepSpeed's.

    Args:
        towers: ``vision``, ``merger`` and ``language``.

    Example:
        >>> from vlcpt.model.counting import TowerParameters
        >>> tower = TowerShape(2, 64, 128, 4, 32, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
        >>> shape = ModelShape(tower, tower, vocabulary=1000, patch=1176)
        >>> frozen, full = TowerParameters("frozen", 10_000, 0), TowerParameters("full", 0, 1_000_000)
        >>> towers = {"vision": frozen, "merger": frozen, "language": full}
        >>> estimate_memory(shape, towers, LargestBatch(1, 64, 32, 0), Setup(checkpointing=False)).optimizer
        8000000
    """
    trained = sum(tower.trained for tower in towers.values())
    weights, gathered = weight_bytes(towers, setup)
    gradients, at_step = gradient_bytes(trained, setup)
    optimizer = optimizer_bytes(trained, setup)
    kept, work = _language(shape, towers["language"].how, batch, setup)
    seen, looking = _vision(shape, towers, batch, setup)
    logits, head = logit_bytes(shape, towers["language"], batch, setup)
    waiting = gradients if setup.accumulates else bucket_bytes(trained, setup)
    inputs = batch.patches * shape.patch * (4 + setup.compute(towers["language"].how))
    inputs += batch.rows * batch.tokens * 60
    inputs += batch.rows * batch.tokens**2 * (setup.masked and setup.attention in ("sdpa", "eager"))
    moments: dict[Moment, tuple[int, int, int]] = {
        "looking": (waiting, looking + gathered, 0),
        "learning": (waiting, kept + seen + max(work - logits, 0) + gathered, max(logits, head)),
        "stepping": (gradients, max(work + seen + gathered, at_step), 0),
    }
    name = max(moments, key=lambda one: sum(moments[one]))
    now, activations, logits = moments[name]
    host = host_bytes(trained, sum(tower.frozen for tower in towers.values()), setup)
    return MemoryEstimate(name, weights, now, optimizer, activations, logits, inputs, host)


def logit_bytes(
    shape: ModelShape, language: TowerParameters, batch: LargestBatch, setup: Setup
) -> tuple[int, int]:
    """Bytes of the logits while they are scored, and while their gradient goes into the output layer.

    For each logit of a chunk its value and its gradient in the type of products, and both in float32; beside
    them the hidden states of all targets and their gradient, and where the type is not the weights' own a
    copy of those. Without chunks 12 bytes a logit, for the log-softmax, its gradient and that of the logits.

    Example:
        >>> from vlcpt.model.counting import TowerParameters
        >>> tower = TowerShape(2, 64, 128, 4, 32, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
        >>> shape, how = ModelShape(tower, tower, vocabulary=1000, patch=1176), TowerParameters("lora", 0, 0)
        >>> batches = [LargestBatch(1, 4096, targets, 0) for targets in (500, 4000)]
        >>> few, many = (logit_bytes(shape, how, batch, Setup())[0] for batch in batches)
        >>> many < 2 * few
        True
    """
    trained = 4 * language.trained_head
    if not setup.loss_chunk:
        return 12 * batch.targets * shape.vocabulary, 4 * batch.targets * shape.vocabulary + trained
    compute, hidden = setup.compute(language.how), setup.hidden(language.how)
    logits = min(batch.targets, setup.loss_chunk) * shape.vocabulary * (8 + 2 * compute)
    states = 2 * batch.targets * shape.language.hidden * hidden
    weights = shape.vocabulary * shape.language.hidden
    is_cast = setup.autocast and (setup.hidden("full" if trained else "frozen") == 4)
    both = logits + states + is_cast * weights * compute
    return both, both + trained


def _language(shape: ModelShape, how: How, batch: LargestBatch, setup: Setup) -> tuple[int, int]:
    """Bytes that the language tower keeps, and those of one layer's backward pass beside them."""
    tower, hidden = shape.language, setup.hidden(how)
    layer = batch.rows * language_layer(tower, how, setup, batch.tokens)
    tokens = batch.rows * batch.tokens
    ends = tokens * tower.hidden * (4 + 2 * hidden)
    work = tokens * (4 * tower.hidden + 3 * tower.intermediate) * setup.compute(how)
    if setup.checkpointing:
        # Autocast remembers its copies of trained weights until the forward pass is over.
        casts = cast_weights(tower, how, setup) if how == "full" else 0
        return ends + tower.layers * (tokens * tower.hidden * hidden + casts), layer + work
    return ends + tower.layers * layer, work


def _vision(
    shape: ModelShape, towers: Mapping[Tower, TowerParameters], batch: LargestBatch, setup: Setup
) -> tuple[int, int]:
    """Bytes that the vision tower and the merger keep, and those at work in the forward pass."""
    tower, how = shape.vision, towers["vision"].how
    compute = setup.compute(how)
    work = batch.patches * tower.hidden * (28 + 4 * compute)
    if how == "frozen":
        return 0, work
    if setup.checkpointing:
        return tower.layers * batch.patches * tower.hidden * compute, work
    kept = tower.layers * vision_layer(tower, how, setup, batch.patches)
    return kept, kept + work
