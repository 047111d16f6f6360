"""What is worth seeing of a frame: its sector, the right way round, and whether that can be asked about at all."""

import time

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.frame_gate import BLACK, FROZEN, FrameGate, is_black
from sonoedge.runtime.orientation import Flip, Orientation
from sonoedge.runtime.preprocess import crop_to_sector
from sonoedge.runtime.sector.tracker import SectorTracker
from sonoedge.runtime.sector.view import View, whole

__all__ = ["FROZEN", "LOOKING", "Eye", "Sight"]

# FROZEN is the one verdict on a picture that can be asked about all the same: somebody froze it to look.
LOOKING = "looking for the sector"


class Sight(msgspec.Struct, frozen=True):
    """A frame whose image is its sector alone, in memory of its own: what stood beside it goes no further than this.

    `poor` says why no hints are asked about it, None when they are. While the sector is looked for, the image is black.
    """

    frame: Frame
    poor: str | None = None

    @property
    def empty(self) -> bool:
        """Whether it shows nothing that a question could be about."""
        return self.poor not in (None, FROZEN)

    @property
    def age_ms(self) -> float:
        """Milliseconds since it was captured."""
        return (time.monotonic_ns() - self.frame.captured_ns) / 1e6


class Eye:
    """Sees the frames of one feed, in their order."""

    def __init__(self, flip: Flip = "auto") -> None:
        """flip: whether left and right are exchanged; "auto" follows the feed's word or the marker."""
        self._orientation = Orientation(flip)
        self._tracker = SectorTracker()
        self._gate = FrameGate()
        self._region: View | None = None

    def see(self, frame: Frame) -> Sight:
        """Return the sector of `frame` and the verdict on it."""
        flipped = self._orientation.is_flipped(frame)
        picture, view = frame.image, self._region
        if frame.sector is not None:  # the feed knows
            picture = crop_to_sector(frame)
            if view is None or view.allowed.shape != picture.shape[:2]:
                self._region = view = whole(picture.shape)
        else:
            view = self._tracker.see(picture, still=frame.still)
        if view is None:
            return self._sight(frame, np.zeros_like(picture), BLACK if is_black(picture[::4, ::4]) else LOOKING)
        known = frame.sector is None  # a region of DICOM is a box around whatever shape there is
        poor = self._gate.judge(msgspec.structs.replace(frame, image=picture), view, shape_known=known)
        shown = view.of(picture)
        if flipped:
            shown = np.ascontiguousarray(shown[:, ::-1])
        return self._sight(frame, shown if shown.base is None else shown.copy(), poor)

    def _sight(self, frame: Frame, image: npt.NDArray[np.uint8], poor: str | None) -> Sight:
        return Sight(msgspec.structs.replace(frame, image=image, sector=None, flipped=False), poor)
