"""Observers: from all values an input ever had to the largest magnitude that int8 keeps; larger ones are clipped.

optimum's and onnxruntime's calibrators read the tensors of a graph, where an expert's tokens cannot be told from those
that were never routed to it; these take values wherever they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor

from sonoedge.calibration.thresholds import (
    Counts,
    entropy_threshold,
    percentile_threshold,
    squared_error_threshold,
)
from sonoedge.errors import SonoEdgeError

Method = Literal["min-max", "percentile", "entropy", "mse"]
BINS = 8192  # where the largest value is a thousand times the usual one, eight of them still tell the usual ones apart
PORTION = 2**17  # values counted at once, so that what is computed of them stays in the cache
LEAST_EXPONENT = -100  # of the upper end: what lies below is 0 to any product that has a larger input too


class Observer(Protocol):
    """Sees values in any portions and says where to clip."""

    def update(self, values: Tensor) -> None:
        """Note values of any shape; raises SonoEdgeError naming the product when one is not finite."""
        ...

    def threshold(self) -> float:
        """The largest magnitude to keep; 0 when nothing but zeros was seen, which no int8 scale fits."""
        ...


def make_observer(method: Method, percentile: float = 99.99, name: str = "a product") -> Observer:
    """An observer of the given kind for the input of the product `name`.

    percentile: of the magnitudes, how many the observer "percentile" keeps. Raises SonoEdgeError for another kind.
    """
    if method == "min-max":
        return _MinMax(name)
    choose: dict[str, Callable[[Counts, float], float]] = {
        "percentile": partial(percentile_threshold, percentile=percentile),
        "entropy": entropy_threshold,
        "mse": squared_error_threshold,
    }
    if method not in choose:
        raise SonoEdgeError(f"calibration.observer {method!r} is unknown: choose min-max, {', '.join(choose)}")
    return _Histogram(name, choose[method])


class _MinMax:
    """Keeps everything."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._largest = 0.0

    def update(self, values: Tensor) -> None:
        self._largest = max(self._largest, _largest(values, self._name))

    def threshold(self) -> float:
        return self._largest


class _Histogram:
    """Counts magnitudes in equal bins up to a power of two: however the values are portioned, the counts are the same.

    A larger power of two joins neighbouring bins, and a value's bin is found without rounding.
    """

    def __init__(self, name: str, choose: Callable[[Counts, float], float]) -> None:
        self._name, self._choose = name, choose
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._exponent = LEAST_EXPONENT  # of the upper end
        self._largest = 0.0

    def update(self, values: Tensor) -> None:
        largest = _largest(values, self._name)
        if largest > self._largest:
            self._largest = largest
            self._widen(math.frexp(largest)[1])
        scale = math.ldexp(BINS, -self._exponent)
        for portion in values.detach().flatten().split(PORTION):
            bins = portion.to(torch.float32).abs().mul_(scale).to(torch.int32)
            self._counts += torch.bincount(bins, minlength=BINS)

    def _widen(self, exponent: int) -> None:
        """Let the bins reach 2^exponent."""
        wider = exponent - self._exponent
        if wider <= 0:
            return
        self._exponent = exponent
        for _ in range(min(wider, BINS.bit_length())):
            joined = self._counts.view(-1, 2).sum(1)
            self._counts = torch.cat([joined, torch.zeros_like(joined)])

    def threshold(self) -> float:
        if self._largest == 0:
            return 0.0
        return min(self._largest, self._choose(self._counts.numpy(), math.ldexp(1 / BINS, self._exponent)))


def _largest(values: Tensor, name: str) -> float:
    """The largest magnitude; raises SonoEdgeError when one is not finite."""
    if not values.numel():
        return 0.0
    least, most = torch.aminmax(values.detach())  # NaN where there is one
    largest = float(torch.maximum(-least, most))
    if not math.isfinite(largest):
        raise SonoEdgeError(
            f"the input of {name} is not finite: check the checkpoint's weights and the calibration frames"
        )
    return largest
