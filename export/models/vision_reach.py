"""Which patches attend which in a vision tower: all of their picture, or those of their window (arXiv 2502.13923)."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from sonoedge.export.models.attention import attention, visible_bias
from sonoedge.export.models.config import VisionConfig
from sonoedge.export.models.rope import Grid, patch_places

# (q, k, v), each [n, heads, D] and rotated but v -> [n, heads * D]
VisionAttend = Callable[[Tensor, Tensor, Tensor], Tensor]

MOST_WINDOWS = 1 << 20  # in a row of windows: more than any picture has


class Reach(NamedTuple):
    """How patches attend in the two sorts of blocks; a tower without windows uses the first alone."""

    full: VisionAttend
    windowed: VisionAttend

    def of(self, block: int, config: VisionConfig) -> VisionAttend:
        """How they attend in the block of that number."""
        return self.full if config.attends_fully(block) else self.windowed


def reach_of(grids: Sequence[Grid], config: VisionConfig, device: torch.device) -> Reach:
    """The reach of the patches of several pictures, each frame alone, computed run by run without a mask."""
    full = partial(_attend_runs, sizes=[rows * columns for count, rows, columns in grids for _ in range(count)])
    if config.windows is None:
        return Reach(full, full)
    order, sizes = window_runs(grids, config, device)
    return Reach(full, partial(_attend_runs, sizes=sizes, order=order))


def reach_by_mask(places: Tensor, config: VisionConfig) -> Reach:
    """The reach of one picture's patches at `places` [n, 2] (row, column), by a mask: fit for a graph of any grid."""
    full = partial(_attend, count=1)
    if config.windows is None:
        return Reach(full, full)
    # No place is negative, and division towards zero is one operator of a graph where floor division is six.
    row, column = torch.div(places, config.window_patches, rounding_mode="trunc").unbind(-1)
    window = row * MOST_WINDOWS + column  # [n]
    bias = visible_bias(window[:, None] == window[None, :], torch.float32)  # [n, n]
    return Reach(full, partial(_attend, count=1, bias=bias[None, None]))


def window_runs(grids: Sequence[Grid], config: VisionConfig, device: torch.device) -> tuple[Tensor, list[int]]:
    """The patches window by window, int64 [n], and how many each window has, those of one size side by side.

    Windows at the right and lower edge are smaller where the grid does not divide; none reaches over two pictures.
    """
    merge, side = config.spatial_merge_size, config.window_patches
    windows = [
        torch.cat((places.new_full((len(places), 1), picture), places // side), dim=1)
        for picture, places in enumerate(patch_places(grid, merge, device) for grid in grids)
    ]
    _, window, sizes = torch.unique(torch.cat(windows), dim=0, return_inverse=True, return_counts=True)
    order = (sizes[window] * len(sizes) + window).argsort(stable=True)
    return order, sizes.sort().values.tolist()


def _attend_runs(q: Tensor, k: Tensor, v: Tensor, *, sizes: Sequence[int], order: Tensor | None = None) -> Tensor:
    """Attention in runs of `sizes` patches, taken in `order` (None: as they stand)."""
    if order is not None:
        q, k, v = q[order], k[order], v[order]
    parts = []
    start = 0
    for size, run in groupby(sizes):
        count = sum(1 for _ in run)
        part = slice(start, start + count * size)
        parts.append(_attend(q[part], k[part], v[part], count=count))
        start = part.stop
    mixed = parts[0] if len(parts) == 1 else torch.cat(parts)
    return mixed if order is None else mixed[order.argsort()]


def _attend(q: Tensor, k: Tensor, v: Tensor, *, count: int, bias: Tensor | None = None) -> Tensor:
    """Attention in `count` segments of equal size, bias [count or 1, 1, n / count, n / count]."""
    q, k, v = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in (q, k, v))  # [count, heads, n / count, D]
    return attention(q, k, v, bias).transpose(1, 2).flatten(0, 1).flatten(1)
