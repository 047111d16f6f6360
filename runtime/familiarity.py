"""Whether a picture resembles what the model was trained on: Mahalanobis distance of its mean image embedding."""

import zipfile
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError


class Familiarity(msgspec.Struct, frozen=True):
    """The centre and spread of known pictures, and the distance beyond which a picture is of an unseen kind."""

    mean: npt.NDArray[np.float32]  # [hidden]
    whitening: npt.NDArray[np.float32]  # [hidden, k]: whitening @ whitening.T is the inverse covariance
    threshold: float

    def distance(self, embeds: npt.NDArray[np.float32]) -> float:
        """Return how far the picture with the embeddings [merged, hidden] lies from known ones, in deviations."""
        offset = embeds.mean(axis=0, dtype=np.float32) - self.mean  # [hidden]
        return float(np.linalg.norm(offset @ self.whitening))

    def is_unseen(self, embeds: npt.NDArray[np.float32]) -> bool:
        """Whether the picture is too far from everything known."""
        return self.distance(embeds) > self.threshold

    def save(self, path: Path) -> None:
        """Write the arrays as .npz."""
        np.savez(path, mean=self.mean, whitening=self.whitening, threshold=np.float32(self.threshold))


def load_familiarity(path: Path) -> Familiarity:
    """Read what `Familiarity.save` wrote; raises SonoEdgeError when it is missing, damaged or of the wrong shape."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            mean, whitening, threshold = (np.asarray(arrays[k], np.float32) for k in ("mean", "whitening", "threshold"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SonoEdgeError(f"{path} is no familiarity file ({error}): build the bundle again") from error
    if mean.ndim != 1 or whitening.ndim != 2 or whitening.shape[0] != len(mean) or threshold.shape != ():
        raise SonoEdgeError(
            f"{path} holds mean {list(mean.shape)}, whitening {list(whitening.shape)} and threshold "
            f"{list(threshold.shape)}: expected [hidden], [hidden, k] and a number; build the bundle again"
        )
    return Familiarity(mean, whitening, float(threshold))
