"""Whether a picture resembles what the model was trained on: distances of its mean image embedding to known regions.

The distance is that to the nearest region, less a share of that to the middle of everything known (relative
Mahalanobis distance: J. Ren et al., arXiv 2106.09022; the whole of it would hide pictures that are far from all).
"""

import zipfile
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError

_REGIONS = ("centres", "within")  # files of before lack them


class Familiarity(msgspec.Struct, frozen=True):
    """The centres and spread of known pictures, and the distance beyond which a picture is of an unseen kind.

    Without `centres` the distance is that to the middle of everything, in deviations.
    """

    mean: npt.NDArray[np.float32]  # [hidden]
    whitening: npt.NDArray[np.float32]  # [hidden, k]: whitening @ whitening.T is the inverse covariance
    threshold: float
    centres: npt.NDArray[np.float32] | None = None  # [regions, k], of whitened embeddings
    within: npt.NDArray[np.float32] | None = None  # [k, k], whitens them again by their spread within a region
    background: float = 0.0  # share of the distance to the middle that is taken off

    def distance(self, embeds: npt.NDArray[np.float32]) -> float:
        """Return how far the picture with the embeddings [merged, hidden] lies from known ones; larger is stranger."""
        offset = (embeds.mean(axis=0, dtype=np.float32) - self.mean) @ self.whitening  # [k]
        if self.centres is None or self.within is None:
            return float(np.linalg.norm(offset))
        nearest = np.square((offset - self.centres) @ self.within).sum(axis=1).min()
        return float(nearest - self.background * np.square(offset).sum())

    def is_unseen(self, embeds: npt.NDArray[np.float32]) -> bool:
        """Whether the picture is too far from everything known."""
        return self.distance(embeds) > self.threshold

    def save(self, path: Path) -> None:
        """Write the arrays as .npz."""
        common = {
            "mean": self.mean,
            "whitening": self.whitening,
            "threshold": np.float32(self.threshold),
            "background": np.float32(self.background),
        }
        if self.centres is None or self.within is None:
            np.savez(path, allow_pickle=False, **common)
        else:
            np.savez(path, allow_pickle=False, **common, centres=self.centres, within=self.within)


def load_familiarity(path: Path) -> Familiarity:
    """Read what `Familiarity.save` wrote; raises SonoEdgeError when it is missing, damaged or of the wrong shape."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            mean, whitening, threshold = (np.asarray(arrays[k], np.float32) for k in ("mean", "whitening", "threshold"))
            background = float(arrays["background"]) if "background" in arrays else 0.0
            centres, within = (np.asarray(arrays[k], np.float32) if k in arrays else None for k in _REGIONS)
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SonoEdgeError(f"{path} is no familiarity file ({error}): build the bundle again") from error
    if mean.ndim != 1 or whitening.ndim != 2 or whitening.shape[0] != len(mean) or threshold.shape != ():
        raise SonoEdgeError(
            f"{path} holds mean {list(mean.shape)}, whitening {list(whitening.shape)} and threshold "
            f"{list(threshold.shape)}: expected [hidden], [hidden, k] and a number; build the bundle again"
        )
    kept = whitening.shape[1]
    if (centres is None) != (within is None) or (
        centres is not None
        and within is not None
        and (centres.ndim != 2 or not len(centres) or centres.shape[1] != kept or within.shape != (kept, kept))
    ):
        raise SonoEdgeError(
            f"{path} holds centres and within that do not fit {kept} directions: expected [regions, {kept}] and "
            f"[{kept}, {kept}]; build the bundle again"
        )
    return Familiarity(mean, whitening, float(threshold), centres, within, background)
