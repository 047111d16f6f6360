"""What calibration does with one block: smooth it if the recipe says so, then measure its inputs, routes and cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from sonoedge.calibration.observers import Observer, make_observer
from sonoedge.calibration.smoothing import Smoothing
from sonoedge.calibration.table import CalibrationTable
from sonoedge.export.block_smoothing import find_factors, smooth
from sonoedge.export.product_inputs import input_sources, listening, product_inputs, require_finite
from sonoedge.export.recipe import Calibration
from sonoedge.export.routed_moe import RoutedMoE
from sonoedge.export.smoothing_groups import Factors, SmoothingGroup, smoothing_groups
from sonoedge.export.streamed_model import Block, Passage
from sonoedge.export.weights import Weights


class BlockCalibration:
    """Calibrates the blocks of a streamed model in their order; `table` and `smoothing` grow with each."""

    def __init__(self, weights: Weights, settings: Calibration) -> None:
        self.table = CalibrationTable(settings.frames, settings.observer, {}, {}, {}, {}, {}, None)
        self._factors = Factors({}, {})
        self._weights, self._settings = weights, settings
        self._groups = smoothing_groups(weights.config)

    @property
    def smoothing(self) -> Smoothing:
        """The factors found so far."""
        return Smoothing(self._factors.rows, self._factors.columns)

    def through(self, block: Block, passages: Sequence[Passage]) -> None:
        """Calibrate `block` and replace every passage's x by what it makes of it.

        Raises SonoEdgeError naming the product whose input is not finite, or the expert that saw too few tokens.
        """
        groups = self._groups.get(block.name, ())
        if self._settings.smooth and groups:
            for group, found in zip(groups, find_factors(block, passages, groups, self._weights), strict=True):
                self.table.alphas[group.name] = found.alpha
                if found.alpha:
                    self._factors.add(group, found.factors)
            smooth(block, self.smoothing)
            self.table.smoothing_sha256 = self.smoothing.sha256
        self._measure(block, passages, groups)
        self.table.require_coverage(self._settings.least_expert_tokens)

    def _measure(self, block: Block, passages: Sequence[Passage], groups: Sequence[SmoothingGroup]) -> None:
        inputs, sources = product_inputs(block), input_sources(groups)
        # Products that share an input are measured once.
        measured = {product: module for product, module in inputs.items() if sources.get(product, product) == product}
        mixtures = {product: module for product, module in inputs.items() if isinstance(module, RoutedMoE)}
        ranges, cache = _Ranges(self._settings), _Ranges(self._settings)

        def note_cache(keys: Tensor, values: Tensor) -> None:
            for name, tensor in ((f"{block.name}.self_attn.key", keys), (f"{block.name}.self_attn.value", values)):
                require_finite(name, tensor)
                cache.update(name, tensor)

        with listening(measured, ranges.update):
            for passage in passages:
                with listening(mixtures, partial(self._count, mixtures, passage.region)):
                    passage.x = block.run(passage, note_cache)
        thresholds = ranges.thresholds()
        # The down projection of an expert that no token chose has no range.
        shared = {product: sources.get(product, product) for product in inputs}
        self.table.input_maximum |= {p: thresholds[source] for p, source in shared.items() if source in thresholds}
        self.table.cache_maximum |= cache.thresholds()

    def _count(self, mixtures: Mapping[str, RoutedMoE], region: str | None, product: str, x: Tensor) -> None:
        moe = mixtures[product]
        chosen = moe.route(moe.gate(x)) > 0  # [..., experts]
        self.table.add_routing(product, chosen.flatten(0, -2), region)


class _Ranges:
    """An observer for each name, made when its first values come."""

    def __init__(self, settings: Calibration) -> None:
        self._settings = settings
        self._observers: dict[str, Observer] = {}

    def update(self, name: str, values: Tensor) -> None:
        """Note values of any shape."""
        if name not in self._observers:
            self._observers[name] = make_observer(self._settings.observer, self._settings.percentile, name)
        self._observers[name].update(values)

    def thresholds(self) -> dict[str, float]:
        """What every observer makes of all values."""
        return {name: observer.threshold() for name, observer in self._observers.items()}
