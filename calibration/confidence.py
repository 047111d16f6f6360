"""Probabilities that can be trusted: a temperature a hint, fitted on frames that neither training nor ranges saw.

Source: C. Guo et al., "On Calibration of Modern Neural Networks" (arXiv 1706.04599).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from sonoedge.bundle import HintCalibration
from sonoedge.calibration.scores import HintScores

TEMPERATURES = np.geomspace(0.25, 8.0, 101)
BINS = 15
SUREST = 0.9999


def fit(scores: HintScores, least_accuracy: float) -> HintCalibration:
    """The temperature of least negative log-likelihood, and the probability below which the hint abstains.

    `abstain_below` is the lowest confidence at which those answers that are at least as confident are right in a share
    of `least_accuracy` or more of the frames; 1 when no confidence reaches it.
    """
    losses = [negative_log_likelihood(scores, temperature) for temperature in TEMPERATURES]
    temperature = float(TEMPERATURES[int(np.argmin(losses))])
    confidence = probabilities(scores, temperature).max(axis=1)  # [n]
    order = np.argsort(-confidence, kind="stable")
    share_right = np.cumsum(scores.correct[order]) / np.arange(1, order.size + 1)  # [n], of the most confident so far
    # Frames of equal confidence speak or stay silent together: only the last of them can be the limit.
    last = np.append(np.diff(confidence[order]) != 0, True)  # [n]
    reached = np.flatnonzero((share_right >= least_accuracy) & last)
    abstain_below = 1.0
    if reached.size:
        # Rounded down and under 1, so that another machine's last digit cannot silence a hint that is always sure.
        abstain_below = min(math.floor(float(confidence[order[reached[-1]]]) * 1e4) / 1e4, SUREST)
    return HintCalibration(temperature=round(temperature, 4), abstain_below=abstain_below)


def probabilities(scores: HintScores, temperature: float) -> npt.NDArray[np.float64]:
    """Probability of every candidate [n, candidates]."""
    scaled = scores.scores.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def negative_log_likelihood(scores: HintScores, temperature: float) -> float:
    """Mean -log p of the right candidates."""
    chosen = probabilities(scores, temperature)[np.arange(scores.right.size), scores.right]
    return float(-np.log(np.maximum(chosen, 1e-12)).mean())


def expected_calibration_error(scores: HintScores, temperature: float) -> float:
    """Mean distance of confidence and accuracy over equal-width bins of confidence, weighted by their frames."""
    confidence = probabilities(scores, temperature).max(axis=1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    error = 0.0
    for index in np.unique(bins):
        inside = bins == index
        error += inside.mean() * abs(scores.correct[inside].mean() - confidence[inside].mean())
    return float(error)
