"""What calibration measured: activation ranges, KV-cache ranges, routing by region, smoothing; a file in the bundle."""

from __future__ import annotations

import hashlib

import msgspec
from torch import Tensor

from sonoedge.errors import SonoEdgeError


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
        counts = [int(count) for count in chosen.sum(0)]
        _add(self.expert_tokens, product, counts)
        if region is not None:
            _add(self.region_tokens.setdefault(region, {}), product, counts)

    def require_coverage(self, least: int) -> None:
        """Raise SonoEdgeError naming the first layer and expert that saw fewer than `least` tokens."""
        for product, tokens in self.expert_tokens.items():
            for expert, count in enumerate(tokens):
                if count < least:
                    raise SonoEdgeError(
                        f"calibration gave {product}.{expert} only {count} tokens of the {least} that "
                        "calibration.least_expert_tokens asks for: calibrate on more, or on more varied, frames"
                    )

    def routing_rows(self) -> list[tuple[str, str, tuple[float, ...]]]:
        """(region, mixture, share of each expert) for every mixture, region "all" first."""
        tables = {"all": self.expert_tokens, **dict(sorted(self.region_tokens.items()))}
        return [
            (region, product, tuple(count / max(1, sum(tokens)) for count in tokens))
            for region, table in tables.items()
            for product, tokens in table.items()
        ]


def _add(table: dict[str, list[int]], product: str, counts: list[int]) -> None:
    known = table.get(product) or [0] * len(counts)
    table[product] = [a + b for a, b in zip(known, counts, strict=True)]
