"""From the scores of a hint's candidates to probabilities that can be trusted, and the candidates that may be right."""

import numpy as np
import numpy.typing as npt

from sonoedge.bundle import HintCalibration

SUREST_LOGIT = 16.0  # of a top probability before Platt's line: beyond it float rounds to one


def probabilities(scores: npt.NDArray[np.floating], calibration: HintCalibration) -> npt.NDArray[np.float64]:
    """Return the probability of every candidate [..., candidates] from its log-probability [..., candidates].

    Scores are divided by the temperature, then scaled and shifted a candidate (vector scaling, arXiv 1706.04599) where
    the calibration says so; last, the top probability is put through Platt's line and the others share what is left.
    """
    logits = np.asarray(scores, np.float64) / calibration.temperature
    if calibration.scale:
        logits = logits * np.array(calibration.scale) + np.array(calibration.shift)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: npt.NDArray[np.float64] = weights / weights.sum(axis=-1, keepdims=True)
    return shares if calibration.platt is None else _on_the_line(shares, *calibration.platt)


def top_logit(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the log-odds of the likeliest candidate [...], bounded where it is as good as certain."""
    top = shares.max(axis=-1)
    rest = shares.sum(axis=-1) - top
    logit: npt.NDArray[np.float64] = np.log(top) - np.log(np.maximum(rest, 1e-300))
    return np.minimum(logit, SUREST_LOGIT)


def may_be_right(
    shares: npt.NDArray[np.float64], calibration: HintCalibration, quality: str | None
) -> npt.NDArray[np.bool_]:
    """Return which candidates [..., candidates] belong to the set of stated coverage; the likeliest always does.

    quality: the frame's quality hint, which has a limit of its own where the calibration measured one.
    """
    floor = calibration.set_floors.get(quality or "", calibration.set_floor)
    inside: npt.NDArray[np.bool_] = (shares >= floor) | (shares == shares.max(axis=-1, keepdims=True))
    return inside


def _on_the_line(shares: npt.NDArray[np.float64], slope: float, intercept: float) -> npt.NDArray[np.float64]:
    """Move the top probability along Platt's line, never below the runner-up: the answer stays the answer."""
    best = np.expand_dims(shares.argmax(axis=-1), -1)
    top = 1 / (1 + np.exp(-np.clip(slope * top_logit(shares) + intercept, -30, 30)))[..., None]
    others = shares.copy()
    np.put_along_axis(others, best, 0.0, axis=-1)
    share_of_others = others / np.maximum(others.sum(axis=-1, keepdims=True), 1e-300)
    runner_up = share_of_others.max(axis=-1, keepdims=True)
    top = np.maximum(top, runner_up / (1 + runner_up))
    moved: npt.NDArray[np.float64] = share_of_others * (1 - top)
    np.put_along_axis(moved, best, top, axis=-1)
    return moved
