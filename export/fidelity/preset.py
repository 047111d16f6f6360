"""What a preset did to the experts: its part of the cost report, as data and as a section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import msgspec

from sonoedge.export.fidelity.markup import Html, table
from sonoedge.export.routing_survey import Mixture, heaviest

TOGETHER, PINNING, INT8 = "int8 bundle", "pinned float", "int8 bundle against pinned float"


class PinnedLayer(msgspec.Struct, frozen=True):
    """The experts of one layer; shares are of routing mass in the model with all experts, by expert."""

    mixture: str
    kept: tuple[int, ...]
    mass_kept: float  # share of the region's routing mass that the experts kept carry
    image: tuple[float, ...]  # shares of the region's image tokens
    text: tuple[float, ...]
    image_from_text: float  # share of the mass that lies on other experts, 0 to 1
    elsewhere: tuple[float, ...] | None = None  # of other regions; None where the data holds none
    kept_elsewhere: tuple[int, ...] | None = None  # the experts that other regions would have kept
    region_from_elsewhere: float | None = None

    @classmethod
    def of(cls, mixture: Mixture, kept: tuple[int, ...]) -> PinnedLayer:
        """What was measured of a layer, and what stayed of it."""
        use, elsewhere = mixture.use, mixture.elsewhere
        layer = cls(
            mixture.name,
            kept,
            sum(use.shares[expert] for expert in kept),
            mixture.image.shares,
            mixture.text.shares,
            mixture.image.distance(mixture.text),
        )
        if elsewhere is None:
            return layer
        return msgspec.structs.replace(
            layer,
            elsewhere=elsewhere.shares,
            kept_elsewhere=heaviest(elsewhere, len(kept)),
            region_from_elsewhere=use.distance(elsewhere),
        )


class PinnedExperts(msgspec.Struct, frozen=True):
    """A preset's choice; bytes of the bundle's weights file, and of the checkpoint's weights in their own type."""

    region: str
    method: str
    tokens: int  # of the region, on which routing was measured
    layers: tuple[PinnedLayer, ...]
    weights_bytes_before: int  # what the file holds with all experts in the same schemes
    weights_bytes_after: int
    checkpoint_bytes_before: int
    checkpoint_bytes_after: int

    @property
    def experts(self) -> str:
        """How many of how many are left in a layer."""
        return f"{len(self.layers[0].kept)} of {len(self.layers[0].image)} experts a layer"

    @property
    def least_mass_kept(self) -> float:
        """In the layer that keeps least."""
        return min(layer.mass_kept for layer in self.layers)

    @property
    def verdict(self) -> str:
        """Whether routing is the region's own, in a sentence."""
        apart = [layer.region_from_elsewhere for layer in self.layers if layer.region_from_elsewhere is not None]
        if not apart:
            return "The data holds no other region, so whether this routing is the region's own was not measured."
        region = sum(apart) / len(apart)
        kind = sum(layer.image_from_text for layer in self.layers) / len(self.layers)
        same = sum(layer.kept == layer.kept_elsewhere for layer in self.layers)
        follows = "text against image more than region" if kind > region else "region more than text against image"
        return (
            f"Routing follows {follows}: {kind:.0%} of the mass lies on other experts between text and image, "
            f"{region:.0%} between {self.region} and other regions; in {same} of {len(self.layers)} layers other "
            "regions would keep the same experts."
        )


def preset_section(pinned: PinnedExperts) -> Html:
    """What was kept, why, and what it saves."""
    told = (
        f"{pinned.experts} are kept for {pinned.region} ({pinned.method}), chosen by the routing of {pinned.tokens:,} "
        f"of its tokens; they carry at least {pinned.least_mass_kept:.1%} of the routing mass in every layer. "
        f"{pinned.verdict}"
    )
    columns = (
        f'"{TOGETHER}" is what is shipped, against the float model with all experts; "{PINNING}" is what pinning alone '
        f'changes; "{INT8}" what INT8 adds. All on frames of {pinned.region} that had no part in choosing the experts.'
    )
    sizes = [
        ["weights of the bundle", *_sizes(pinned.weights_bytes_before, pinned.weights_bytes_after)],
        ["weights of the checkpoint", *_sizes(pinned.checkpoint_bytes_before, pinned.checkpoint_bytes_after)],
    ]
    rows = [
        [
            layer.mixture,
            _numbers(layer.kept),
            f"{100 * layer.mass_kept:.1f} %",
            _shares(layer.image),
            _shares(layer.text),
            None if layer.elsewhere is None else _shares(layer.elsewhere),
            None if layer.kept_elsewhere is None else _numbers(layer.kept_elsewhere),
        ]
        for layer in pinned.layers
    ]
    header = ["mixture", "kept", "mass kept", "image tokens, %", "text, %", "other regions, %", "others would keep"]
    return Html(
        f"<h2>Experts pinned for {escape(pinned.region)}</h2><p>{escape(told)}</p><p>{escape(columns)}</p>"
        f"{table(['bytes', 'with all experts', 'pinned', 'saved'], sizes)}"
        f"<p><small>Shares of routing mass by expert, in the float model with all experts.</small></p>"
        f"{table(header, rows)}"
    )


def _sizes(before: int, after: int) -> Sequence[object]:
    return f"{before:,}", f"{after:,}", f"{before - after:,} ({(before - after) / before:.1%})"


def _numbers(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))


def _shares(shares: Sequence[float]) -> str:
    return " · ".join(f"{100 * share:.0f}" for share in shares)
