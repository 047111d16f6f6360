"""What is worth seeing of a frame: its sector, the right way round, and whether that can be asked about at all."""

import msgspec

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.orientation import Flip, Orientation
from sonoedge.runtime.preprocess import crop_to_sector

FROZEN = "frozen"  # the one verdict on a picture that can be asked about all the same: somebody froze it to look


class Sight(msgspec.Struct, frozen=True):
    """A frame whose image is its sector alone, in memory of its own: what stood beside it goes no further than this.

    `poor` says why no hints are asked about it, None when they are.
    """

    frame: Frame
    poor: str | None = None

    @property
    def empty(self) -> bool:
        """Whether it shows nothing that a question could be about."""
        return self.poor not in (None, FROZEN)


class Eye:
    """Sees the frames of one feed, in their order."""

    def __init__(self, flip: Flip = "auto") -> None:
        """flip: whether left and right are exchanged; "auto" follows the feed's word or the marker."""
        self._orientation = Orientation(flip)

    def see(self, frame: Frame) -> Sight:
        """Return the sector of `frame` and the verdict on it."""
        sector = self._orientation.upright(crop_to_sector(frame), frame)
        own = sector if sector.base is None else sector.copy()
        return Sight(msgspec.structs.replace(frame, image=own, sector=None, flipped=False))
