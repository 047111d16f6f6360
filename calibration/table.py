"""What calibration measured: activation ranges, KV-cache ranges, routing by region, smoothing; a file in the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from sonoedge.errors import SonoEdgeError

ALL_REGIONS = "all"


class RoutingRow(msgspec.Struct, frozen=True):
    """How the tokens of one mixture fell on its experts, in the frames of one region or in all of them."""

    region: str
    mixture: str
    tokens: tuple[int, ...]  # of every expert

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of all choices that each expert was, zeros where there were none."""
        return tuple(count / max(1, sum(self.tokens)) for count in self.tokens)


class CalibrationTable(msgspec.Struct):
    """The calibration of one checkpoint; the same inputs give the same bytes.

    input_maximum: the largest |x| that int8 keeps, of every product's input, after smoothing. cache_maximum: the same
    for the keys and values of a layer ("….self_attn.key", ".value"). expert_tokens: how many tokens each expert of a
    mixture got; region_tokens: the same by anatomical region, of samples whose region is known. alphas: the exponent of
    SmoothQuant for every group of weights, 0 where none helped.
    """

    frames: int
    observer: str
    input_maximum: dict[str, float]
    cache_maximum: dict[str, float]
    expert_tokens: dict[str, list[int]]
    region_tokens: dict[str, dict[str, list[int]]]
    alphas: dict[str, float]
    smoothing_sha256: str | None

    @classmethod
    def empty(cls) -> CalibrationTable:
        """The table of a build that calibrates nothing."""
        return cls(0, "none", {}, {}, {}, {}, {}, None)

    @property
    def sha256(self) -> str:
        """Content hash."""
        return hashlib.sha256(self.encoded()).hexdigest()

    def encoded(self) -> bytes:
        """The table as JSON, keys sorted, indented so that a person can read it."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1) + b"\n"

    def add_routing(self, product: str, chosen: Tensor, region: str | None) -> None:
        """Count tokens of the mixture `product`: chosen bool [tokens, experts], in a frame of `region` if known."""
        counts: list[int] = chosen.sum(0, dtype=torch.int64).tolist()
        _add(self.expert_tokens, product, counts)
        if region is not None:
            _add(self.region_tokens.setdefault(region, {}), product, counts)

    def require_coverage(self, least: int) -> None:
        """Raise SonoEdgeError when experts saw fewer than `least` tokens, naming the one that saw the fewest."""
        seen = [
            (count, product, expert)
            for product, tokens in self.expert_tokens.items()
            for expert, count in enumerate(tokens)
            if count < least
        ]
        if not seen:
            return
        count, product, expert = min(seen, key=lambda one: one[0])
        others = f", and {len(seen) - 1} other experts too few" if len(seen) > 1 else ""
        raise SonoEdgeError(
            f"calibration gave {product}.{expert} only {count} tokens of the {least} that "
            f"calibration.least_expert_tokens asks for{others}: calibrate on more, or on more varied, frames"
        )

    def routing_rows(self) -> tuple[RoutingRow, ...]:
        """The tokens of every mixture, first in all frames, then region by region."""
        by_region = [(ALL_REGIONS, self.expert_tokens), *sorted(self.region_tokens.items())]
        return tuple(
            RoutingRow(region, mixture, tuple(tokens))
            for region, mixtures in by_region
            for mixture, tokens in mixtures.items()
        )


def _add(table: dict[str, list[int]], product: str, counts: Sequence[int]) -> None:
    known = table.get(product) or [0] * len(counts)
    table[product] = [a + b for a, b in zip(known, counts, strict=True)]
