"""A folder of pictures played in the natural order of their names, or one picture as a still feed."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources.pace import Pace
from sonoedge.runtime.sources.recorded import RecordedSource

DEFAULT_FPS = 10.0  # pictures state no rate


def read_picture(path: Path) -> npt.NDArray[np.uint8]:
    """Read one picture as RGB [height, width, 3]: grey is repeated, transparency dropped, 16 bits become 8.

    Raises SonoEdgeError when the file is not a picture or is damaged.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith("I"):  # Pillow would clip 16-bit values at 255
                wide = np.asarray(picture).astype(np.int64)
                return np.repeat((np.clip(wide, 0, 65535) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            return np.asarray(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SonoEdgeError(f"{path} is not a picture that can be read ({error}): give a whole PNG or JPEG") from error


def _check_header(path: Path) -> None:
    try:
        Image.open(path).close()  # reads no pixels
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SonoEdgeError(f"{path} is not a picture: remove it from the feed or replace it") from error


class PictureSource(RecordedSource):
    """Pictures played one after the other; a single one is a still feed."""

    def __init__(self, name: str, paths: Sequence[Path], pace: Pace) -> None:
        """Check that every path is a picture; raises SonoEdgeError naming the one that is not."""
        super().__init__(name, pace, fps=DEFAULT_FPS)
        self.still = True
        self._paths = sorted(paths, key=_natural)
        for path in self._paths:
            _check_header(path)
        self._still = read_picture(self._paths[0])

    def pictures(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the pictures in order; raises SonoEdgeError for one that is damaged."""
        yield self._still
        for path in self._paths[1:]:
            yield read_picture(path)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """frame_2 comes before frame_10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", path.name)
    ]
