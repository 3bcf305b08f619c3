"""What a sample costs to train on, from the shapes of the towers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig

from vlcpt.data.encode.encoder import IGNORE_INDEX
from vlcpt.data.families import TOWERS, Tower, is_embedding, tower_of
from vlcpt.data.plan.balance import PackCost
from vlcpt.model.gpus import gpu_of
from vlcpt.model.tuning import base_model
from vlcpt.training.loss import BatchTensors

MEGA = 10**6


def cost_of(model: nn.Module, *, recomputes: bool) -> PackCost:
    """The cost of a sample's tokens, targets and media, forward and backward, as this model trains.

    A product of matrices is counted once forward, once more backward where its input has a gradient, and
    again where its weight has one. Adapters, norms and the optimizer are left out: they are small, or the
    same for every pack. An output layer that trains makes its logits again backward.

    Args:
        model: With or without adapters, wrapped or not.
        recomputes: Whether activations are computed again instead of kept.

    Example:
        >>> from vlcpt import ModelConfig, load_model
        >>> from vlcpt.demo import base_path
        >>> model = load_model(ModelConfig(base_path(), lora_r=4))
        >>> frozen, full = (cost_of(one, recomputes=False) for one in (model, load_model(ModelConfig(
        ...     base_path(), tuning="full"))))
        >>> frozen.token < full.token, frozen.media == full.media
        (True, True)
    """
    backward, head = _backward(model)
    return cost_of_shape(base_model(model).config, backward, trains_head=head, recomputes=recomputes)


def cost_of_shape(
    config: PreTrainedConfig, backward: Mapping[Tower, int], *, trains_head: bool, recomputes: bool
) -> PackCost:
    """The same from a model's configuration.

    Args:
        backward: For each tower, products backward for one forward: 0 frozen, 1 with adapters, 2 in full.
        trains_head: Whether the output layer trains.
    """
    text, vision = config.get_text_config(), config.vision_config
    again = int(recomputes)
    h, i, v = text.hidden_size, text.intermediate_size, vision.hidden_size
    keys = h // text.num_attention_heads * text.num_key_value_heads
    layer = 2 * h * h + 2 * h * keys + 3 * h * i
    # Of a tower that only looks no gradient passes, and nothing is computed again.
    sees = backward["vision"] > 0
    blocks, attention = 1 + backward["vision"] + again * sees, 1 + (2 + again) * sees
    full, merged = len(vision.fullatt_block_indexes), vision.spatial_merge_size**2
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    patch = 2 * blocks * (vision.depth * (4 * v * v + 3 * v * vision.intermediate_size) + pixels * v)
    # Within a window each patch sees all others.
    patch += 4 * attention * v * (vision.depth - full) * (vision.window_size // vision.patch_size) ** 2
    inner = v * merged
    merger = 2 * (1 + max(backward["merger"], sees)) * (inner * inner + inner * vision.out_hidden_size)
    return PackCost(
        token=2 * (2 + (backward["language"] > 1) + again) * text.num_hidden_layers * layer / MEGA,
        pair=2 * (3 + again) * text.num_hidden_layers * h / MEGA,  # of which half is masked
        target=2 * (4 if trains_head else 2) * h * text.vocab_size / MEGA,
        media=(merged * patch + merger) / MEGA,
        frame_pair=4 * attention * v * full * merged**2 / MEGA,
    )


def _backward(model: nn.Module) -> tuple[dict[Tower, int], bool]:
    """Products backward for one forward in each tower: 0 where it is frozen, 1 with adapters, 2 in full.

    And whether the output layer, or the embeddings that it may be tied to, train.
    """
    found, head = dict.fromkeys(TOWERS, 0), False
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_embedding(name):
            head = True
            continue
        tower = tower_of(name)
        found[tower] = max(found[tower], 1 if ".lora_" in name else 2)
    return found, head


class PeakShare:
    """The share of a GPU's peak that a run uses for what its model needs (model FLOPs utilisation).

    What is computed again (activations, logits) does not count as used.

    Args:
        cost: That of a sample, without what is computed again.
        peak: Operations a second.
        merge: Patches that make a token.
    """

    def __init__(self, cost: PackCost, peak: float, merge: int) -> None:
        self._cost, self._peak, self._merge = cost, peak, merge
        self._operations = 0

    def count(self, batch: BatchTensors) -> None:
        """Note a batch of this rank; one without bounds, of another collator, counts as nothing."""
        lengths, labels = batch.get("document_lengths"), batch["labels"]
        if not isinstance(lengths, list) or not isinstance(labels, torch.Tensor):
            return
        frames = np.array(
            [one for kind in ("image", "video") for one in _numbers(batch.get(f"{kind}_frame_lengths"))]
        )
        tokens = frames / self._merge
        # Of which document targets and media are, does not matter to the sum.
        targets, media, pairs = (np.zeros(len(lengths)) for _ in range(3))
        targets[0] = int((labels[:, 1:] != IGNORE_INDEX).sum())
        media[0], pairs[0] = tokens.sum(), (tokens**2).sum()
        self._operations += int(self._cost.of(np.array(lengths), targets, media, pairs).sum()) * MEGA

    def take(self, seconds: float) -> float:
        """The share since this was last called."""
        share = self._operations / self._peak / max(seconds, 1e-9)
        self._operations = 0
        return share


def peak_share(
    model: nn.Module, device: torch.device, dtype: torch.dtype, name: str | None = None
) -> PeakShare | None:
    """What measures the share of a device's peak; None where that is not known, or products have 32 bits.

    Args:
        dtype: That of products.
        name: That of the GPU; default: what torch says.
    """
    if name is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    gpu = gpu_of(name) if name else None
    if gpu is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    merge = base_model(model).config.vision_config.spatial_merge_size ** 2
    return PeakShare(cost_of(model, recomputes=False), gpu.peak, merge)


def _numbers(value: object) -> Sequence[int]:
    return value if isinstance(value, list) else []
