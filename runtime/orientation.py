"""Which way round the picture is: sides are counted from the orientation marker, so a flipped picture is turned back.

By convention the marker stands at the upper left of the sector. Where a feed draws it in colour on a grey picture (as
the handheld devices tried do) it can be found; a grey marker cannot be told from anatomy, and then a setting says it.
"""

from typing import Literal

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.frame import Frame

Flip = Literal["auto", "yes", "no"]
Corner = Literal["left", "right"]

COLOURED = 60  # difference of the channels
BRIGHT = 18
MARKER_SHARE = (0.008, 0.06)  # its sides, of the picture's shorter side
UPPER_SHARE = 0.35  # of the picture, in which a marker's centre lies
LEAST_OFFSET = 0.1  # of the picture's width, from the middle of what is bright
AGREEING = 5  # looks that say the same before it is believed
LOOK_EVERY = 10  # frames; markers move when somebody presses a button
SEARCHED_PX = 360  # of the shorter side; larger pictures are thinned, markers grow with them


class Orientation:
    """Turns the pictures of one feed the right way round."""

    def __init__(self, flip: Flip = "auto") -> None:
        """flip: "yes" or "no" when somebody knows; "auto" follows the feed's word, then a marker that is found."""
        self._flip = flip
        self._found: Corner | None = None
        self._agreed = 0
        self._frames = 0
        self.marker: Corner | None = None  # where it was found, once several looks agreed

    def is_flipped(self, frame: Frame) -> bool:
        """Whether left and right are exchanged in `frame`; looks for the marker now and then."""
        if self._flip != "auto":
            return self._flip == "yes"
        if frame.flipped is not None:
            return frame.flipped
        if self._frames % (LOOK_EVERY if self.marker else 1) == 0:
            self._look(frame)
        self._frames += 1
        return self.marker == "right"

    def upright(self, sector: npt.NDArray[np.uint8], frame: Frame) -> npt.NDArray[np.uint8]:
        """Return the sector [height, width, 3] of `frame` with the marker's side at the left."""
        return np.ascontiguousarray(sector[:, ::-1]) if self.is_flipped(frame) else sector

    def _look(self, frame: Frame) -> None:
        found = find_marker(frame.image)
        if found is None:  # hidden or not there: what was agreed on stands
            return
        self._agreed = self._agreed + 1 if found == self._found else 1
        self._found = found
        if self._agreed >= AGREEING:
            self.marker = found


class _Blob(msgspec.Struct, frozen=True):
    x: float
    y: float
    width: int
    height: int


def find_marker(image: npt.NDArray[np.uint8]) -> Corner | None:
    """Return at which side of the sector the one small coloured mark of a picture [height, width, 3] stands.

    None when nothing is coloured, more than one thing is (a flow image, a coloured menu), or it is not where and as
    large as a marker is.
    """
    step = max(1, min(image.shape[:2]) // SEARCHED_PX)
    small = np.ascontiguousarray(image[::step, ::step])
    height, width = small.shape[:2]
    red, green, blue = cv2.split(small)
    peak = cv2.max(cv2.max(red, green), blue)
    coloured = (cv2.subtract(peak, cv2.min(cv2.min(red, green), blue)) >= COLOURED).astype(np.uint8)
    if not coloured.any():
        return None
    reach = max(3, min(height, width) // 80)
    closed = cv2.morphologyEx(coloured, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8))
    blobs = _blobs(np.asarray(closed, np.uint8))
    if len(blobs) != 1:
        return None
    mark, sides = blobs[0], [share * min(height, width) for share in MARKER_SHARE]
    if not all(sides[0] <= side <= sides[1] for side in (mark.width, mark.height)) or mark.y > UPPER_SHARE * height:
        return None
    columns = ((peak > BRIGHT) & (coloured == 0)).sum(axis=0)  # [width]
    if not columns.any():
        return None
    offset = mark.x - float(np.average(np.arange(width), weights=columns))
    if abs(offset) < LEAST_OFFSET * width:
        return None
    return "left" if offset < 0 else "right"


def _blobs(mask: npt.NDArray[np.uint8]) -> list[_Blob]:
    _, _, boxes, centres = cv2.connectedComponentsWithStats(np.ascontiguousarray(mask))
    return [
        _Blob(float(x), float(y), int(box[2]), int(box[3])) for box, (x, y) in zip(boxes[1:], centres[1:], strict=True)
    ]
