"""Where int8 should clip, chosen from a histogram of magnitudes: by a percentile, by entropy or by the squared error.

A histogram is how many magnitudes fell into each of its bins, which are equally wide and begin at 0.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

STEPS = 127  # from 0 to the largest int8
LEVELS = STEPS + 1  # magnitudes that int8 has
ENTROPY_BINS = 2048  # as in the source; finer ones are mostly empty, and their divergence is noise
ENTROPY_STRIDE = 8  # bins between two thresholds that are tried
LEAST_DENSITY = 1e-12  # of an occupied bin whose level holds nothing, instead of an infinite divergence
SMALLEST_SHARE = 2.0**-8  # of the whole range, as a threshold
COARSE, FINE = 1.04, 1.005  # ratio of two thresholds that are tried, first everywhere, then around the best

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def percentile_threshold(counts: Counts, width: float, percentile: float) -> float:
    """The magnitude that `percentile` per cent of all values do not exceed; counts [bins], each bin filled evenly."""
    reached = np.cumsum(counts)
    wanted = percentile / 100 * float(reached[-1])
    index = min(int(np.searchsorted(reached, wanted)), counts.size - 1)
    missing = float(reached[index]) - wanted
    return (index + 1 - missing / max(int(counts[index]), 1)) * width


def entropy_threshold(counts: Counts, width: float) -> float:
    """The threshold at which the int8 distribution is nearest to the clipped one in KL divergence.

    counts [bins], a multiple of 2048. Source: S. Migacz, "8-bit inference with TensorRT" (GTC 2017), with 128 levels.
    """
    joined = counts.size // ENTROPY_BINS
    coarse = counts.reshape(-1, joined).sum(axis=1).astype(np.float64)  # [2048]
    last = _occupied(coarse)
    kept = sorted({*range(min(LEVELS, last), last, ENTROPY_STRIDE), last})
    divergences = [_divergence(coarse, bins) for bins in kept]
    return float(kept[int(np.argmin(divergences))] * joined * width)


def squared_error_threshold(counts: Counts, width: float) -> float:
    """The threshold at which rounding and clipping together cost least squared error, counts [bins] filled evenly."""
    last = _occupied(counts)
    steps = -np.diff(counts, prepend=0, append=0)  # of the density, at every edge [bins + 1]
    at = np.flatnonzero(steps)
    edges: Floats = at.astype(np.float64) * width
    weights: Floats = steps[at].astype(np.float64) / width

    def error(threshold: float) -> float:
        return float(np.dot(weights, _squared_error_below(edges, threshold / STEPS)))

    largest = last * width
    count = math.floor(math.log(SMALLEST_SHARE) / -math.log(COARSE))
    best = min((largest * COARSE**-power for power in range(count)), key=error)
    around = round(math.log(COARSE) / math.log(FINE))
    return min((min(largest, best * FINE**power) for power in range(-around, around + 1)), key=error)


def _divergence(counts: Floats, kept: int) -> float:
    """KL divergence of the int8 distribution that keeps the first `kept` bins, from the clipped one."""
    wanted = counts[:kept].copy()
    wanted[-1] += counts[kept:].sum()
    occupied = wanted > 0
    starts = np.unique(np.arange(LEVELS) * kept // LEVELS)  # of every level; fewer bins than levels: one each
    sizes = np.diff(starts, append=kept)
    # What a level holds is spread evenly over those of its bins that hold anything.
    mean = np.add.reduceat(counts[:kept], starts) / np.maximum(np.add.reduceat(occupied, starts, dtype=np.float64), 1)
    given = np.repeat(mean, sizes)[occupied]
    p = wanted[occupied] / wanted.sum()
    q = np.maximum(given / max(given.sum(), 1.0), LEAST_DENSITY)
    return float(p @ np.log(p / q))


def _squared_error_below(edges: Floats, scale: float) -> Floats:
    """Integral from 0 to `edges` of the squared distance between a magnitude and its int8 value."""
    places = edges / scale
    # In steps, the integral from 0 to a level n is n/12, and from n on it is a cubic: to half a step either way where
    # values are rounded to n, and without end where n is the largest level, to which they are clipped.
    nearest = np.minimum(np.rint(places), STEPS)
    integral: Floats = scale**3 * (nearest / 12 + (places - nearest) ** 3 / 3)
    return integral


def _occupied(counts: Counts | Floats) -> int:
    """How many bins there are up to the last occupied one."""
    return int(np.flatnonzero(counts)[-1]) + 1
