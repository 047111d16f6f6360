"""Sets of candidates that hold the right one in a stated share of frames, whatever the model's probabilities are worth.

Split conformal prediction with the least ambiguous sets: a candidate is in the set when its probability is at least a
floor, the quantile of the right candidates' probabilities on frames held back. Source: M. Sadinle, J. Lei, L.
Wasserman, "Least Ambiguous Set-Valued Classifiers with Bounded Error Levels", JASA 2019 (arXiv 1609.00451).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.bundle import HintCalibration
from sonoedge.calibration.confidence import fit, of_the_right, probabilities
from sonoedge.calibration.scores import HintScores, ScoredFrames
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.hint_engine import QUALITY
from sonoedge.runtime.hint_probability import may_be_right
from sonoedge.runtime.hints import load_schema

LEAST_FRAMES = 150  # of one quality, before it gets a floor of its own


def calibrate(scored: ScoredFrames, least_accuracy: float, coverage: float) -> dict[str, HintCalibration]:
    """Of every hint its calibration, from the frames with odd numbers, and its sets, from those with even ones."""
    quality = said_quality(scored)
    calibrated = {}
    for name, scores in scored.hints.items():
        held_back = scores.frames % 2 == 0
        if held_back.all():
            raise SonoEdgeError(
                f"hints.frames = {len(scored.truths)}: that few leave none to calibrate {name} on: use hundreds"
            )
        fitted = fit(scores.subset(~held_back), least_accuracy)
        sets_from = scores.subset(held_back)
        names = None if quality is None else quality[sets_from.frames]
        calibrated[name] = with_sets(fitted, sets_from, coverage, names)
    return calibrated


def said_quality(scored: ScoredFrames) -> npt.NDArray[np.str_] | None:
    """What the quality hint says of every frame of the pool; None when it was not asked about all of them."""
    said = scored.hints.get(QUALITY)
    if said is None or said.right.size != len(scored.truths):
        return None
    names: npt.NDArray[np.str_] = np.asarray(load_schema().hint(QUALITY).candidate_ids())[said.scores.argmax(axis=1)]
    return names


def with_sets(
    calibration: HintCalibration,
    held_back: HintScores,
    coverage: float,
    quality: npt.NDArray[np.str_] | None = None,
) -> HintCalibration:
    """Add the floors that reach `coverage` to a calibration fitted on other frames than `held_back`.

    quality: what the quality hint says of each of the frames [n]; a quality with enough of them gets its own floor
    (Mondrian). Too few frames for the promise give a floor of 0, every candidate.
    """
    chosen = of_the_right(held_back, calibration)
    floors: Mapping[str, float] = {}
    if quality is not None:
        names, counts = np.unique(quality, return_counts=True)
        floors = {
            str(name): floor_of(chosen[quality == name], coverage)
            for name, count in zip(names, counts, strict=True)
            if count >= LEAST_FRAMES
        }
    return msgspec.structs.replace(
        calibration, coverage=coverage, set_floor=floor_of(chosen, coverage), set_floors=dict(floors)
    )


def floor_of(right: npt.NDArray[np.float64], coverage: float) -> float:
    """The floor under which at most a share 1 - `coverage` of (n + 1) right candidates [n] fall, rounded down."""
    rank = math.floor((right.size + 1) * (1 - coverage) + 1e-9)  # of the smallest, from 1
    return 0.0 if rank < 1 else math.floor(float(np.sort(right)[rank - 1]) * 1e6) / 1e6


def covered(
    scores: HintScores, calibration: HintCalibration, quality: npt.NDArray[np.str_] | None = None
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Whether the set holds the right candidate, and how many it holds, of every frame [n]."""
    shares = probabilities(scores, calibration)
    names = [None] * len(shares) if quality is None else [str(name) for name in quality]
    sets = np.stack([may_be_right(row, calibration, name) for row, name in zip(shares, names, strict=True)])
    return sets[np.arange(len(sets)), scores.right], sets.sum(axis=1)
