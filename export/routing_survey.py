"""Which experts the tokens of one region go to, layer by layer, in the float model, beside those of other regions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from sonoedge.export.product_inputs import listening
from sonoedge.export.routed_moe import RoutedMoE
from sonoedge.export.streamed_model import Block, Passage, stream
from sonoedge.export.weights import Weights


class Use(msgspec.Struct, frozen=True):
    """How some tokens used the experts of one mixture."""

    tokens: int
    chosen: tuple[int, ...]  # tokens that chose each expert
    mass: tuple[float, ...]  # the routing weights of each expert, summed over the tokens that chose it

    @property
    def shares(self) -> tuple[float, ...]:
        """The part of the routing mass that each expert carried, zeros where there was no token."""
        whole = sum(self.mass)
        return tuple(mass / whole if whole else 0.0 for mass in self.mass)

    def __add__(self, other: Use) -> Use:
        return Use(
            self.tokens + other.tokens,
            tuple(a + b for a, b in zip(self.chosen, other.chosen, strict=True)),
            tuple(a + b for a, b in zip(self.mass, other.mass, strict=True)),
        )

    def distance(self, other: Use) -> float:
        """The share of routing mass that lies on other experts, 0 to 1 (total variation)."""
        return sum(abs(a - b) for a, b in zip(self.shares, other.shares, strict=True)) / 2


class Mixture(msgspec.Struct, frozen=True):
    """The experts of one layer, "model.layers.N.moe.experts", as a region's tokens used them."""

    name: str
    image: Use
    text: Use
    elsewhere: Use | None = None  # all tokens of other regions; None where the data holds none

    @property
    def use(self) -> Use:
        """Of all tokens of the region."""
        return self.image + self.text

    def heaviest(self, count: int) -> tuple[int, ...]:
        """The `count` experts that carry most of the region's mass, in their order; of equals, the first."""
        return heaviest(self.use, count)


def heaviest(use: Use, count: int) -> tuple[int, ...]:
    """The `count` experts that carry most mass, in their order; of equals, the first."""
    ranked = sorted(range(len(use.mass)), key=lambda expert: (-use.mass[expert], expert))
    return tuple(sorted(ranked[:count]))


@torch.no_grad()
def survey_routing(checkpoint: Path, passages: Sequence[Passage], region: str) -> tuple[Mixture, ...]:
    """Run `passages` through the float model, block by block, and say how those of `region` were routed in each layer.

    Raises SonoEdgeError naming the product whose activations are not finite.
    """
    weights = Weights(checkpoint)
    found: list[Mixture] = []

    def through(block: Block, some: Sequence[Passage]) -> None:
        mixtures = mixtures_of(block)
        uses: dict[str, dict[str, Use]] = {name: {} for name in mixtures}
        for passage in some:
            is_image = passage.input_ids[0] == weights.config.image_token_id  # [S]

            def note(name: str, x: Tensor, is_image: Tensor = is_image, known: str | None = passage.region) -> None:
                moe = mixtures[name]
                routed = moe.route(moe.gate(x))[0]  # [S, experts]
                parts = (
                    {"image": is_image, "text": ~is_image}
                    if known == region
                    else {"elsewhere": torch.ones_like(is_image)}
                )
                for part, picked in parts.items():
                    use = _use(routed[picked])
                    uses[name][part] = uses[name][part] + use if part in uses[name] else use

            with listening(mixtures, note):
                passage.x = block.run(passage)
        found.extend(Mixture(name, held["image"], held["text"], held.get("elsewhere")) for name, held in uses.items())

    stream(weights, passages, through, f"measure routing of {region}")
    return tuple(found)


def mixtures_of(block: Block) -> dict[str, RoutedMoE]:
    """The routed experts of a block by their name, "….moe.experts": one in a layer of EchoVLM, none elsewhere."""
    return {
        f"{block.name}.{leaf}.experts": module
        for leaf, module in block.module.named_modules()
        if isinstance(module, RoutedMoE)
    }


def _use(routed: Tensor) -> Use:
    """Of routing weights [tokens, experts], zero where an expert was not chosen."""
    chosen: list[int] = (routed > 0).sum(0).tolist()
    mass: list[float] = routed.sum(0, dtype=torch.float64).tolist()
    return Use(routed.shape[0], tuple(chosen), tuple(mass))
