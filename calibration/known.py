"""What the model was trained on, as statistics of its image embeddings: what lies far outside is of an unseen kind."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.familiarity import Familiarity

LEAST_FRAMES = 8  # four to fit, four to set the threshold
KEPT_VARIANCE = 0.999  # directions below the last thousandth of the variance are noise that would dominate the distance


def fit_familiarity(mean_embeds: npt.NDArray[np.float32], known_share: float) -> Familiarity:
    """Statistics of known frames [n, hidden]; the threshold lets `known_share` of frames held back from the fit pass.

    Half of the frames give centre and spread, the other half the threshold, so that it holds for frames not in the fit.
    Raises SonoEdgeError when there are too few frames for the directions that matter.
    """
    if mean_embeds.shape[0] < LEAST_FRAMES:
        raise SonoEdgeError(
            f"hints.frames = {mean_embeds.shape[0]}: that few cannot tell known images from unseen ones: "
            f"use at least {LEAST_FRAMES}"
        )
    fitted, held_back = mean_embeds[::2].astype(np.float64), mean_embeds[1::2]
    centre = fitted.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(fitted, rowvar=False))
    values, vectors = values[::-1], vectors[:, ::-1]
    kept = int(np.searchsorted(np.cumsum(values) / values.sum(), KEPT_VARIANCE)) + 1
    if fitted.shape[0] < 2 * kept:
        raise SonoEdgeError(
            f"hints.frames = {mean_embeds.shape[0]}: that few cannot tell how {kept} directions of the image embedding "
            f"vary: use at least {4 * kept}"
        )
    whitening = (vectors[:, :kept] / np.sqrt(values[:kept])).astype(np.float32)  # [hidden, kept]
    known = Familiarity(centre.astype(np.float32), whitening, np.inf)
    distances = np.array([known.distance(row[None]) for row in held_back])
    return Familiarity(known.mean, known.whitening, float(np.quantile(distances, known_share)))
