"""Probabilities that can be trusted: a calibration a hint, fitted on frames that neither training nor ranges saw.

Three ways are fitted and the one of least held-out negative log-likelihood is kept: a temperature, vector scaling (both
C. Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599), and Platt's line on the log-odds of the
likeliest candidate (J. Platt, 1999).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.bundle import HintCalibration
from sonoedge.calibration.scores import HintScores
from sonoedge.runtime import hint_probability

TEMPERATURES = np.geomspace(0.25, 8.0, 101)
BINS = 15
SUREST = 0.9999
FOLDS = 5
NEWTON_STEPS = 25
RIDGE = 2.0  # frames' worth of pull towards the temperature alone, for what few frames cannot tell
LEAST_GAIN = 1e-3  # nats a frame that more parameters must gain on held-out frames
LEAST_FRAMES = 100  # with fewer, a temperature is all that can be told


def fit(scores: HintScores, least_accuracy: float) -> HintCalibration:
    """The calibration of least held-out loss, and the probability below which the hint abstains.

    `abstain_below` is the lowest confidence at which those answers that are at least as confident are right in a share
    of `least_accuracy` or more of the frames; 1 when no confidence reaches it.
    """
    fitted = choose(scores)
    return msgspec.structs.replace(fitted, abstain_below=_silence_limit(scores, fitted, least_accuracy))


def choose(scores: HintScores) -> HintCalibration:
    """The way of calibrating whose loss is least on frames held back in turn, fitted on all of them."""
    if scores.right.size < LEAST_FRAMES:
        return fit_temperature(scores)
    losses = {way: _held_out_loss(scores, way) for way in (fit_temperature, fit_vector, fit_platt)}
    best = min(losses, key=lambda way: losses[way])
    return (best if losses[best] < losses[fit_temperature] - LEAST_GAIN else fit_temperature)(scores)


def fit_temperature(scores: HintScores) -> HintCalibration:
    """The temperature of least negative log-likelihood."""
    losses = [negative_log_likelihood(scores, float(temperature)) for temperature in TEMPERATURES]
    return HintCalibration(temperature=round(float(TEMPERATURES[int(np.argmin(losses))]), 4))


def fit_vector(scores: HintScores) -> HintCalibration:
    """A factor and a shift for every candidate after the temperature; a little ridge keeps rare candidates in place."""
    start = fit_temperature(scores)
    logits = scores.scores.astype(np.float64) / start.temperature  # [n, c]
    frames, count = logits.shape
    wanted = np.eye(count)[scores.right]
    neutral = np.r_[np.ones(count), np.zeros(count)]  # [2c], factors and shifts
    point = neutral.copy()
    slopes = np.concatenate([logits[:, :, None] * np.eye(count), np.tile(np.eye(count), (frames, 1, 1))], axis=2)
    for _ in range(NEWTON_STEPS):  # slopes: of every logit by every parameter [n, c, 2c]
        shares = hint_probability.probabilities(logits * point[:count] + point[count:], HintCalibration())
        gradient = np.einsum("nc,ncp->p", shares - wanted, slopes) + RIDGE * (point - neutral)
        mean_slope = np.einsum("nc,ncp->np", shares, slopes)
        curvature = np.einsum("nc,ncp,ncq->pq", shares, slopes, slopes, optimize=True) - mean_slope.T @ mean_slope
        point = point - np.linalg.solve(curvature + RIDGE * np.eye(2 * count), gradient)
    return msgspec.structs.replace(start, scale=_rounded(point[:count]), shift=_rounded(point[count:]))


def fit_platt(scores: HintScores) -> HintCalibration:
    """A line through the log-odds of the likeliest candidate after the temperature."""
    start = fit_temperature(scores)
    logit = hint_probability.top_logit(hint_probability.probabilities(scores.scores, start))  # [n]
    design = np.stack([logit, np.ones_like(logit)], axis=1)  # [n, 2]
    # Platt's own targets: never certain, so that a hint that is always right gets a finite line.
    right, wrong = scores.correct.sum(), (~scores.correct).sum()
    target = np.where(scores.correct, (right + 1) / (right + 2), 1 / (wrong + 2))
    neutral = np.array([1.0, 0.0])
    line = neutral.copy()
    for _ in range(NEWTON_STEPS):
        share = 1 / (1 + np.exp(-np.clip(design @ line, -30, 30)))
        gradient = design.T @ (share - target) + RIDGE * (line - neutral)
        curvature = (design * (share * (1 - share))[:, None]).T @ design + RIDGE * np.eye(2)
        line = line - np.linalg.solve(curvature, gradient)
    slope, intercept = _rounded(line)
    return msgspec.structs.replace(start, platt=(slope, intercept))


def probabilities(scores: HintScores, calibration: HintCalibration | float) -> npt.NDArray[np.float64]:
    """Probability of every candidate [n, candidates], under a calibration or a bare temperature."""
    if not isinstance(calibration, HintCalibration):
        calibration = HintCalibration(temperature=calibration)
    return hint_probability.probabilities(scores.scores, calibration)


def of_the_right(scores: HintScores, calibration: HintCalibration | float) -> npt.NDArray[np.float64]:
    """Probability of the right candidate of every frame [n]."""
    right: npt.NDArray[np.float64] = probabilities(scores, calibration)[np.arange(scores.right.size), scores.right]
    return right


def answered(
    scores: HintScores, calibration: HintCalibration | float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Confidence in the likeliest candidate [n], and whether it is right [n]: vector scaling may change which it is."""
    shares = probabilities(scores, calibration)
    right: npt.NDArray[np.bool_] = shares.argmax(axis=1) == scores.right
    return shares.max(axis=1), right


def negative_log_likelihood(scores: HintScores, calibration: HintCalibration | float) -> float:
    """Mean -log p of the right candidates."""
    return float(-np.log(np.maximum(of_the_right(scores, calibration), 1e-12)).mean())


def expected_calibration_error(scores: HintScores, calibration: HintCalibration | float) -> float:
    """Mean distance of confidence and accuracy over equal-width bins of confidence, weighted by their frames."""
    confidence, right = answered(scores, calibration)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    error = 0.0
    for index in np.unique(bins):
        inside = bins == index
        error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(error)


def _silence_limit(scores: HintScores, calibration: HintCalibration, least_accuracy: float) -> float:
    confidence, right = answered(scores, calibration)
    order = np.argsort(-confidence, kind="stable")
    share_right = np.cumsum(right[order]) / np.arange(1, order.size + 1)  # [n], of the most confident so far
    # Frames of equal confidence speak or stay silent together: only the last of them can be the limit.
    last = np.append(np.diff(confidence[order]) != 0, True)  # [n]
    reached = np.flatnonzero((share_right >= least_accuracy) & last)
    if not reached.size:
        return 1.0
    # Rounded down and under 1, so that another machine's last digit cannot silence a hint that is always sure.
    return min(math.floor(float(confidence[order[reached[-1]]]) * 1e4) / 1e4, SUREST)


def _held_out_loss(scores: HintScores, way: Callable[[HintScores], HintCalibration]) -> float:
    fold = np.arange(scores.right.size) % FOLDS
    losses = []
    for index in np.unique(fold):
        inside, held_back = scores.subset(fold != index), scores.subset(fold == index)
        if inside.right.size:
            losses.append(negative_log_likelihood(held_back, way(inside)) * held_back.right.size)
    return float(np.sum(losses)) / scores.right.size


def _rounded(values: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(round(float(value), 5) for value in values)
