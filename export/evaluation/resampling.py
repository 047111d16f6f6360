"""How sure a score is, and whether two systems differ: cases are resampled whole, with all their questions.

Sources: B. Efron, R. Tibshirani, "An introduction to the bootstrap" (1993), percentile intervals; P. Koehn,
"Statistical significance tests for machine translation evaluation" (EMNLP 2004), paired resampling; E. Noreen,
"Computer-intensive methods for testing hypotheses" (1989), approximate randomisation; Q. McNemar (Psychometrika 1947),
exact; C. Clopper, E. Pearson (Biometrika 1934).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.export.evaluation.measures import Floats, Measure

SEED = 20_250_918
RESAMPLES = 1_000
PERMUTATIONS = 2_000
LEVEL = 0.95
FEWEST_CASES = 8  # of fewer, resamples know too little: no bounds are given


class Interval(msgspec.Struct, frozen=True):
    """A score with the bounds that 95 % of resamples keep; None where there are too few cases to tell."""

    value: float
    low: float | None
    high: float | None


class McNemar(msgspec.Struct, frozen=True):
    """Questions that one system alone answered rightly, and how probable so uneven a split is by chance."""

    first_only: int
    second_only: int
    p_value: float


class Resampler:
    """Draws the same resamples of a set of cases for every measure and system, so that differences are paired."""

    def __init__(self, owners: npt.NDArray[np.int64], seed: int = SEED) -> None:
        """owners: the case of each question, [n]."""
        _, self._owners = np.unique(owners, return_inverse=True)
        self.cases = int(self._owners.max()) + 1
        rng = np.random.default_rng(seed)
        share = np.full(self.cases, 1 / self.cases)
        self._drawn = rng.multinomial(self.cases, share, RESAMPLES).astype(np.float64)  # [resamples, cases]
        self._swapped = np.random.default_rng([seed, 1])

    def scores(self, measure: Measure) -> Floats:
        """The measure on every resample, [resamples]."""
        sums = self._drawn @ self._by_case(measure.rows)
        return np.array([measure.score(row) for row in sums])

    def interval(self, measure: Measure, scores: Floats) -> Interval:
        """The measure with its percentile interval; `scores` are those of the resamples."""
        value = measure.score(measure.rows.sum(axis=0))
        if self.cases < FEWEST_CASES:
            return Interval(value, None, None)
        low, high = _bounds(scores)
        if measure.share and value in (0.0, 100.0):  # resamples of equal answers are equal: the binomial knows better
            open_side = 100 * (1 - ((1 - LEVEL) / 2) ** (1 / self.cases))
            low, high = (100 - open_side, 100.0) if value else (0.0, open_side)
        return Interval(value, low, high)

    def difference(self, first: Measure, second: Measure, scores: tuple[Floats, Floats]) -> Interval:
        """Second less first with the percentile interval of paired resamples."""
        value = second.score(second.rows.sum(axis=0)) - first.score(first.rows.sum(axis=0))
        if self.cases < FEWEST_CASES:
            return Interval(value, None, None)
        return Interval(value, *_bounds(scores[1] - scores[0]))

    def randomisation(self, first: Measure, second: Measure) -> float:
        """How often swapping both systems' answers, case by case at random, parts them as far: a two-sided p-value."""
        one, other = self._by_case(first.rows), self._by_case(second.rows)
        observed = abs(first.score(one.sum(axis=0)) - second.score(other.sum(axis=0)))
        swapped = self._swapped.integers(0, 2, (PERMUTATIONS, self.cases)).astype(np.float64)
        moved = swapped @ (other - one)
        pairs = zip(one.sum(axis=0) + moved, other.sum(axis=0) - moved, strict=True)
        as_far = sum(abs(first.score(a) - second.score(b)) >= observed - 1e-9 for a, b in pairs)
        return (1 + as_far) / (1 + PERMUTATIONS)

    def _by_case(self, rows: Floats) -> Floats:
        """The statistics of every case, [cases, s]."""
        summed = np.zeros((self.cases, rows.shape[1]))
        np.add.at(summed, self._owners, rows)
        return summed


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """The exact two-sided test on questions that both systems answered, each independent of the others."""
    pairs = list(zip(first, second, strict=True))
    one, other = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    split = one + other
    tail = sum(comb(split, k) for k in range(min(one, other) + 1)) / 2**split
    return McNemar(one, other, min(1.0, 2 * tail))


def _bounds(scores: Floats) -> tuple[float, float]:
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
