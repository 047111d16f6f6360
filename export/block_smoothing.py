"""SmoothQuant of one block: its groups' inputs are sampled, their factors found, and its weights smoothed in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sonoedge.calibration.smoothing import MOST_ROWS, MOST_TOKENS, Found, Smoothing, evenly, search
from sonoedge.export.product_inputs import listening, product_inputs, product_of
from sonoedge.export.smoothing_groups import SmoothingGroup
from sonoedge.export.streamed_model import Block, Passage
from sonoedge.export.weights import Weights

APPLIED_ROWS = 1024  # of a weight at once
# Factors hardly change with more, and each costs as much as it does in the measuring that follows.
MOST_PASSAGES = 32


class _Seen:
    """What a search wants to know of an input: every other time it comes, tokens are kept; else its largest values."""

    def __init__(self, columns: int, calls: int) -> None:
        self._quota = max(1, 2 * MOST_TOKENS // calls)  # tokens kept of a call
        self._kept = [torch.empty(0, columns)]
        self._maximum = [torch.zeros(columns), torch.zeros(columns)]  # of calls with tokens kept, and of the others
        self._calls = 0

    def update(self, x: Tensor) -> None:
        """Note x [..., columns]."""
        x = x.flatten(0, -2)
        side = self._calls % 2
        self._maximum[side] = torch.maximum(self._maximum[side], torch.linalg.vector_norm(x, torch.inf, 0))
        if side == 0:
            self._kept.append(evenly(x, self._quota).clone())
        self._calls += 1

    def search(self, weights: Sequence[Tensor], group: SmoothingGroup) -> Found:
        """The factors of `group`, whose input this is."""
        maximum = torch.maximum(*self._maximum)
        elsewhere = self._maximum[1] if self._calls > 1 else maximum
        return search(torch.cat(self._kept), elsewhere, maximum, weights, group.channel)


def find_factors(
    block: Block, passages: Sequence[Passage], groups: Sequence[SmoothingGroup], weights: Weights
) -> list[Found]:
    """The factors of every group, from its inputs in at most 32 of `passages` and from the block's weights as they are.

    No group's factors change what another's consumers compute, so each is found as if it were alone.
    """
    passages = passages[:: -(-len(passages) // MOST_PASSAGES)]
    sources = [product_of(group.consumers[0]) for group in groups]
    seen = {source: _Seen(group.channel.shape[0], len(passages)) for source, group in zip(sources, groups, strict=True)}
    inputs = {product: module for product, module in product_inputs(block).items() if product in seen}
    with listening(inputs, lambda product, x: seen[product].update(x)):
        for passage in passages:
            block.run(passage)
    found = []
    for source, group in zip(sources, groups, strict=True):
        read = [_weight(block, key, weights) for key in group.consumers]
        found.append(seen[source].search(read, group))
    return found


def smooth(block: Block, smoothing: Smoothing) -> None:
    """Apply the factors to the block's weights in place."""
    for name, parameter in block.module.named_parameters():
        for first in range(0, parameter.shape[0], APPLIED_ROWS):
            rows = parameter[first : first + APPLIED_ROWS]
            rows.copy_(smoothing.apply(f"{block.name}.{name}", rows, first))


def _weight(block: Block, key: str, weights: Weights) -> Tensor:
    """The weight [out, in] `key`; of the head, which is no block's, as many rows as a search uses."""
    if key == weights.head_key:
        rows = weights.row_count(key)
        return weights.rows(key, range(0, rows, -(-rows // MOST_ROWS)))
    return block.module.get_parameter(key.removeprefix(f"{block.name}."))
