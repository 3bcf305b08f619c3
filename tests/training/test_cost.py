"""The cost of a sample against operations that torch counts, at shapes and not by formula."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support import digits, png, row
from vlcpt import CPTDataCollator, CPTDataset, ModelConfig, load_model
from vlcpt.data.plan.balance import PackCost
from vlcpt.demo import base_path
from vlcpt.training.cost import MEGA, PeakShare, cost_of, peak_share
from vlcpt.training.loss import target_losses

WAYS = {
    "lora": {"lora_r": 1},
    "full": {"tuning": "full"},
    "full with the merger": {"tuning": "full", "train_merger": True},
    "all in full": {"tuning": "full", "train_merger": True, "train_vision": True},
    "all in full with embeddings": {
        "tuning": "full", "train_merger": True, "train_vision": True, "train_embeddings": True
    },
}  # fmt: skip


def counted(model, tokens: int, targets: int, grid: tuple[int, int, int] | None = None) -> int:
    """Operations of a step on one sample, forward and backward; attention with its masked half."""
    media = 0 if grid is None else grid[0] * grid[1] * grid[2] // 4
    config = model.config
    ids = torch.full((1, tokens), 5)
    inputs = {"use_cache": False, "position_ids": torch.arange(tokens).expand(3, 1, -1)}
    if grid is not None:
        ids[:, 1 : 1 + media] = config.image_token_id
        inputs |= {
            "image_grid_thw": torch.tensor([grid]),
            "pixel_values": torch.zeros(4 * media, 3 * 2 * 14 * 14),
            "mm_token_type_ids": (ids == config.image_token_id).int(),
        }
    labels = torch.full((1, tokens), -100)
    labels[:, -targets:] = 5
    with FlopCounterMode(display=False) as counter:
        target_losses(model, {"input_ids": ids, "labels": labels, **inputs}).nll.sum().backward()
    return counter.get_total_flops()


@pytest.fixture(scope="module", params=WAYS)
def model(request):
    return load_model(ModelConfig(base_path(), attn_implementation="eager", **WAYS[request.param])).train()


def test_tokens_and_their_pairs_cost_what_torch_counts(model):
    one, two, four = (counted(model, tokens, 1) for tokens in (64, 128, 256))
    cost = cost_of(model, recomputes=False)

    # From three lengths: what grows with the length, and with its square, of which half is masked.
    pairs = (four - 3 * two + 2 * one) / (256**2 - 3 * 128**2 + 2 * 64**2)
    token = (two - one - pairs * (128**2 - 64**2)) / 64
    assert pairs / 2 == pytest.approx(cost.pair * MEGA, rel=0.02)
    assert token == pytest.approx(cost.token * MEGA, rel=0.1)


def test_targets_cost_what_torch_counts(model):
    growth = (counted(model, 500, 400) - counted(model, 500, 200)) / 200

    # One of the four products of a layer that trains is added in place, which torch does not count.
    seen = 3 / 4 if model.get_output_embeddings().weight.requires_grad else 1
    assert growth == pytest.approx(cost_of(model, recomputes=False).target * MEGA * seen, rel=0.02)


def test_media_tokens_cost_what_torch_counts(model):
    cost = cost_of(model, recomputes=False)
    tokens = [counted(model, 600, 1, (1, height, 32)) - counted(model, 600, 1) for height in (32, 64)]

    expected = [cost.media * n + cost.frame_pair * n**2 for n in (256, 512)]
    assert (tokens[1] - tokens[0]) / MEGA == pytest.approx(expected[1] - expected[0], rel=0.05)


def test_what_is_computed_again_counts_again_only_where_gradients_pass():
    model = load_model(ModelConfig(base_path(), lora_r=4))
    kept, again = (cost_of(model, recomputes=one) for one in (False, True))

    assert again.token == pytest.approx(1.5 * kept.token)
    assert again.pair == pytest.approx(4 / 3 * kept.pair)
    assert again.media == kept.media
    assert again.frame_pair == kept.frame_pair


def test_the_share_of_the_peak_counts_documents_targets_and_frames_of_a_batch(tiny_processor):
    """What each of them costs is compared with torch above; here they are counted by hand."""
    rows = [row(f"<image>{digits(30)}", images=[png(1, 280, 280)]), row(digits(20))]
    collator = CPTDataCollator(tiny_processor)
    collator.window_size = 112
    batch = collator([CPTDataset(rows, tiny_processor, max_length=2048)[0]])
    share = PeakShare(PackCost(token=1, pair=1, target=1000, media=10**6, frame_pair=10**9), MEGA, merge=4)

    share.count(batch)

    # An image of 10 × 10 tokens between its start and end, 30 digits and the end; 20 digits and the end.
    lengths = [102 + 31, 21]
    tokens, pairs, targets = sum(lengths), sum(one**2 for one in lengths), 31 + 20  # a first token is none
    assert share.take(1.0) == tokens + pairs + 1000 * targets + 10**6 * 100 + 10**9 * 100**2
    assert share.take(1.0) == 0


def test_without_a_known_gpu_or_16_bits_there_is_no_share():
    model = load_model(ModelConfig(base_path()))

    assert peak_share(model, torch.device("cpu"), torch.bfloat16) is None
    assert peak_share(model, torch.device("cpu"), torch.float32, "NVIDIA H200") is None
    assert peak_share(model, torch.device("cpu"), torch.bfloat16, "Tesla T4") is None
