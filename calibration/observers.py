"""Observers: from all values an input ever had to the largest magnitude that int8 keeps; larger ones are clipped.

optimum's and onnxruntime's calibrators read the tensors of a graph, where an expert's tokens cannot be told from those
that were never routed to it; these take values wherever they come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sonoedge.errors import SonoEdgeError

Method = Literal["min-max", "percentile", "entropy", "mse"]
BINS = 2048
LEVELS = 128  # magnitudes that int8 has, zero included
STRIDE = 8  # bins between two thresholds that are tried

Histogram = npt.NDArray[np.float64]


class Observer(Protocol):
    """Sees values in any portions and says where to clip."""

    def update(self, values: Tensor) -> None:
        """Note values of any shape; raises SonoEdgeError when one is not finite."""
        ...

    def threshold(self) -> float:
        """The largest magnitude to keep; 0 when nothing but zeros was seen, which no int8 scale fits."""
        ...


def make_observer(method: Method, percentile: float = 99.99) -> Observer:
    """An observer of the given kind; `percentile` of the magnitudes is what the kind of that name keeps."""
    if method == "min-max":
        return _MinMax()
    choose: dict[str, Callable[[Histogram, float], float]] = {
        "percentile": lambda counts, width: _percentile(counts, width, percentile),
        "entropy": _entropy,
        "mse": _least_squares,
    }
    if method not in choose:
        raise SonoEdgeError(f"calibration.observer {method!r} is unknown: choose min-max, {', '.join(choose)}")
    return _Histogram(choose[method])


class _MinMax:
    """Keeps everything."""

    def __init__(self) -> None:
        self._largest = 0.0

    def update(self, values: Tensor) -> None:
        self._largest = max(self._largest, _largest(values))

    def threshold(self) -> float:
        return self._largest


class _Histogram:
    """Counts magnitudes in equal bins up to a power of two, so that the portions in which values come do not matter."""

    def __init__(self, choose: Callable[[Histogram, float], float]) -> None:
        self._choose = choose
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._exponent: int | None = None  # of the upper end
        self._largest = 0.0

    def update(self, values: Tensor) -> None:
        largest = _largest(values)
        self._largest = max(self._largest, largest)
        if largest:
            self._widen(math.frexp(largest)[1])
        # Zeros seen before anything else fall into the first bin of any range.
        scale = math.ldexp(BINS, -(self._exponent or 0))
        places = (values.detach().abs().flatten().to(torch.float64) * scale).to(torch.int64).clamp_(max=BINS - 1)
        self._counts += torch.bincount(places, minlength=BINS)

    def _widen(self, exponent: int) -> None:
        """Let bins be as wide as a range up to 2^exponent needs, joining neighbours."""
        if self._exponent is None:
            self._exponent = exponent
        while self._exponent < exponent:
            joined = self._counts.view(-1, 2).sum(1)
            self._counts = torch.cat([joined, torch.zeros(BINS - joined.numel(), dtype=torch.int64)])
            self._exponent += 1

    def threshold(self) -> float:
        if self._exponent is None:
            return 0.0
        width = math.ldexp(1 / BINS, self._exponent)
        return min(self._largest, self._choose(self._counts.numpy().astype(np.float64), width))


def _largest(values: Tensor) -> float:
    largest = float(values.detach().abs().max()) if values.numel() else 0.0
    if not math.isfinite(largest):
        raise SonoEdgeError("an activation is not finite: check the checkpoint's weights and the calibration frames")
    return largest


def _percentile(counts: Histogram, width: float, percentile: float) -> float:
    """The magnitude that `percentile` per cent of all values do not exceed."""
    reached = np.cumsum(counts) / counts.sum() * 100
    return (int(np.searchsorted(reached, percentile - 1e-9)) + 1) * width


def _entropy(counts: Histogram, width: float) -> float:
    """The threshold whose int8 distribution is nearest in KL divergence (S. Migacz, "8-bit inference with TensorRT", 2017)."""
    last = _last(counts)
    best, threshold = math.inf, last * width
    for kept in _candidates(last):
        wanted = counts[:kept].copy()
        wanted[-1] += counts[kept:].sum()  # clipped values land on the largest level
        level = np.arange(kept) * LEVELS // kept  # of every bin
        occupied = counts[:kept] > 0
        mass = np.bincount(level, counts[:kept], LEVELS)
        share = np.bincount(level, occupied, LEVELS)
        given = np.where(occupied, (mass / np.maximum(share, 1))[level], 0.0)
        divergence = _divergence(wanted, given)
        if divergence < best:
            best, threshold = divergence, kept * width
    return threshold


def _divergence(wanted: Histogram, given: Histogram) -> float:
    p, q = wanted / wanted.sum(), given / max(given.sum(), 1.0)
    # A bin that only clipped values fill would cost infinitely much; it costs as if it held almost nothing instead.
    q = np.maximum(q, 1e-12)
    at = p > 0
    return float((p[at] * np.log(p[at] / q[at])).sum())


def _least_squares(counts: Histogram, width: float) -> float:
    """The threshold with the least expected squared error of rounding and clipping together."""
    last = _last(counts)
    centres = (np.arange(last) + 0.5) * width
    weights = counts[:last]
    best, threshold = math.inf, last * width
    for kept in _candidates(last):
        scale = kept * width / (LEVELS - 1)
        # Magnitudes below half a step round to 0; above, a bin is narrower than a step, so the mean over a step counts.
        rounding = np.where(centres < scale / 2, centres**2, scale**2 / 12)
        clipped = np.maximum(centres - kept * width, 0.0)
        error = float((weights * np.where(clipped > 0, clipped**2, rounding)).sum())
        if error < best:
            best, threshold = error, kept * width
    return threshold


def _last(counts: Histogram) -> int:
    """How many bins there are up to the last occupied one."""
    return int(np.flatnonzero(counts)[-1]) + 1


def _candidates(last: int) -> list[int]:
    """Numbers of bins to keep, the whole range included."""
    return sorted({*range(min(LEVELS, last), last, STRIDE), last})
