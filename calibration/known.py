"""What the model was trained on, as statistics of its image embeddings: what lies far outside is of an unseen kind."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.familiarity import Familiarity

LEAST_FRAMES = 8  # four to fit, four to set the threshold
KEPT_VARIANCE = 0.999  # directions that must be known: there must be frames enough for them
USED_VARIANCE = 0.9999  # directions that are used where frames suffice: real devices differ in the quietest of them
BACKGROUND = 0.9  # see docs/decisions.md: 1 hides pictures far from everything, 0.5 those near a known region
RIDGE = 1e-3  # of the spread within a region, in whitened units


def fit_familiarity(
    mean_embeds: npt.NDArray[np.float32], known_share: float, regions: Sequence[str] | None = None
) -> Familiarity:
    """Statistics of known frames [n, hidden]; the threshold lets `known_share` of frames held back from the fit pass.

    regions: what each frame shows; the distance is then that to the nearest region. Two thirds of the frames give
    centres and spread (half, without regions), the others the threshold, so that it holds for frames not in the fit.
    Raises SonoEdgeError when there are too few frames for the directions that matter.
    """
    frames = mean_embeds.shape[0]
    if frames < LEAST_FRAMES:
        raise SonoEdgeError(
            f"hints.frames = {frames}: that few cannot tell known images from unseen ones: use at least {LEAST_FRAMES}"
        )
    held_back = np.arange(frames) % (2 if regions is None else 3) == 1
    fitted = mean_embeds[~held_back].astype(np.float64)
    centre = fitted.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(fitted, rowvar=False))
    values, vectors = values[::-1], vectors[:, ::-1]
    share = np.cumsum(values) / values.sum()
    kept = int(np.searchsorted(share, KEPT_VARIANCE)) + 1
    if fitted.shape[0] < 2 * kept:
        raise SonoEdgeError(
            f"hints.frames = {frames}: that few cannot tell how {kept} directions of the image embedding "
            f"vary: use at least {4 * kept}"
        )
    if regions is not None:
        kept = min(max(kept, fitted.shape[0] // 4), int(np.searchsorted(share, USED_VARIANCE)) + 1)
    whitening = vectors[:, :kept] / np.sqrt(values[:kept])  # [hidden, kept]
    known = Familiarity(centre.astype(np.float32), whitening.astype(np.float32), np.inf)
    if regions is not None:
        known = _with_regions(known, (fitted - centre) @ whitening, np.asarray(regions)[~held_back])
    distances = np.array([known.distance(row[None]) for row in mean_embeds[held_back]])
    return msgspec.structs.replace(known, threshold=float(np.quantile(distances, known_share)))


def _with_regions(known: Familiarity, whitened: npt.NDArray[np.float64], regions: npt.NDArray[np.str_]) -> Familiarity:
    names, row_of = np.unique(regions, return_inverse=True)
    centres = np.stack([whitened[row_of == row].mean(axis=0) for row in range(len(names))])  # [regions, kept]
    spread = np.cov(whitened - centres[row_of], rowvar=False) + RIDGE * np.eye(whitened.shape[1])
    within = np.linalg.cholesky(np.linalg.inv(spread))
    return msgspec.structs.replace(
        known, centres=centres.astype(np.float32), within=within.astype(np.float32), background=BACKGROUND
    )
