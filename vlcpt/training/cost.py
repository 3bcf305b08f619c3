"""What a sample costs to train on, from the shapes of the towers."""

from __future__ import annotations

from torch import nn

from vlcpt.data.families import TOWERS, Tower, is_embedding, tower_of
from vlcpt.data.plan.balance import PackCost
from vlcpt.model.tuning import base_model

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
    config = base_model(model).config
    text, vision = config.get_text_config(), config.vision_config
    backward, head = _backward(model)
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
        target=2 * (4 if head else 2) * h * text.vocab_size / MEGA,
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
