"""The three positions of each token: in time, height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class VisionBlock(NamedTuple):
    """Where a medium's pad tokens stand, in merged units.

    Args:
        start: Index of the first pad token in the sample.
        grid: (T, H, W) after merging, so T·H·W pads.
        interval: Position steps between two temporal grids; 1 for images.
    """

    start: int
    grid: tuple[int, int, int]
    interval: float


def mrope_positions(length: int, blocks: Sequence[VisionBlock]) -> torch.Tensor:
    """Temporal, height and width position of every token.

    The same numbers as ``Qwen2_5_VLModel.get_rope_index`` of transformers 5.23, which needs the
    model; this needs only the grids, so that loader workers can do it.

    Args:
        length: Tokens of the sample.
        blocks: Its media in order.

    Returns:
        ``position_ids`` of shape (3, length), int64.

    Example:
        >>> mrope_positions(6, [VisionBlock(1, (1, 1, 3), 1.0)]).tolist()
        [[0, 1, 1, 1, 4, 5], [0, 1, 1, 1, 4, 5], [0, 1, 2, 3, 4, 5]]
    """
    parts: list[torch.Tensor] = []
    position, done = 0, 0
    for start, (grid_t, grid_h, grid_w), interval in blocks:
        text = torch.arange(start - done) + position
        position += start - done
        parts.append(text.expand(3, -1))
        # Truncated before the offset is added, as upstream does: float steps, whole positions.
        temporal = (torch.arange(grid_t) * interval).long()
        block = torch.meshgrid(temporal, torch.arange(grid_h), torch.arange(grid_w), indexing="ij")
        parts.append(torch.stack(block).reshape(3, -1) + position)
        # Upstream moves on by the larger side only, even where a long video's last grid lies further.
        position += max(grid_h, grid_w)
        done = start + grid_t * grid_h * grid_w
    parts.append((torch.arange(length - done) + position).expand(3, -1))
    return torch.cat(parts, dim=1)
