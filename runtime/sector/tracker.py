"""Follows the sector of one feed: found on the first clear frame, refined, locked, searched again when it changes."""

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.sector.live_area import Glimpses, Grey, evidence, grey_of, thumb_of
from sonoedge.runtime.sector.outline import Mask
from sonoedge.runtime.sector.view import View, decide, sampled

SAMPLED_PX = 160
TRIES = (1, 2, 4, 8, 16)  # frames seen, after which an unsure search or a first finding is repeated
CHECK_EVERY = 10  # frames
SAME = 0.96  # of the intersection over union: outlines this alike are one
LOST = 0.03  # of what is thick has come to lie outside the outline: it has changed
MOVED = 24  # grey levels
SWITCHED = 0.02  # of what lies outside the sector changed at once: menus opened, or the layout changed


class SectorTracker:
    """Says how the pictures of one feed are to be shown."""

    def __init__(self) -> None:
        self.view: View | None = None
        self._shape: tuple[int, ...] = ()
        self._glimpses = Glimpses()
        self._sample: Grey | None = None
        self._outside: Mask | None = None  # of the sample
        self._since_check = 0
        self._left: float | None = None  # menus and logos that stood outside when the sector was locked

    @property
    def locked(self) -> bool:
        """Whether the sector is known and no longer refined."""
        return self.view is not None and self._glimpses.frames >= TRIES[-1]

    def see(self, image: npt.NDArray[np.uint8], *, still: bool = False) -> View | None:
        """Return how to show a picture [height, width, 3]; None while the sector is unsure.

        still: the picture was given for itself, so that it may have nothing in common with the one before.
        """
        sample = sampled(image, SAMPLED_PX)
        if image.shape != self._shape or (still and not self._is_same(sample)):
            self._begin(image.shape)
        elif self._has_switched(sample) or (self.view is not None and not self.view.is_blank_outside(image)):
            self._search_again(image)
        self._sample = sample
        if self._glimpses.frames < TRIES[-1]:
            self._refine(image)
        else:
            self._since_check += 1
            if self._since_check >= CHECK_EVERY:
                self._check(image)
        return self.view

    def _begin(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self._use(None)
        self._glimpses = Glimpses()
        self._since_check, self._left = 0, None

    def _use(self, view: View | None) -> None:
        self.view = view
        if view is None:
            self._outside = None
            return
        height, width = (len(range(0, side, -(-max(self._shape[:2]) // SAMPLED_PX))) for side in self._shape[:2])
        small = cv2.resize(view.allowed, (width, height), interpolation=cv2.INTER_NEAREST)
        self._outside = np.asarray(cv2.bitwise_not(cv2.dilate(small, np.ones((5, 5), np.uint8))), np.uint8)

    def _refine(self, image: npt.NDArray[np.uint8]) -> None:
        self._glimpses.add(thumb_of(grey_of(image)))
        if self._glimpses.frames not in TRIES or (self.view is not None and self.view.blank is not None):
            return
        found = decide(self._glimpses, image)
        if found is not None and (self.view is None or _alike(found, self.view) < SAME):
            self._use(found)

    def _check(self, image: npt.NDArray[np.uint8]) -> None:
        """Search again where something thick lies outside."""
        self._since_check = 0
        if self.view is None:
            self._glimpses = Glimpses()  # what was gathered did not do: gather anew
            return
        fresh = Glimpses()
        fresh.add(thumb_of(grey_of(image)))
        left = self._left_of(fresh)
        if self._left is None:
            self._left = left
        elif left > self._left + LOST:
            self._search_again(image)

    def _left_of(self, fresh: Glimpses) -> float:
        """The largest thick piece outside the outline, as a share of all that is thick."""
        assert self.view is not None
        thick = evidence(fresh)[0].thick
        inside = cv2.resize(self.view.allowed, thick.shape[::-1], interpolation=cv2.INTER_NEAREST)
        outside = np.asarray(cv2.dilate(inside, np.ones((5, 5), np.uint8)) == 0, np.uint8)
        count, _, stats, _ = cv2.connectedComponentsWithStats(thick & outside)
        largest = max((int(stats[index, cv2.CC_STAT_AREA]) for index in range(1, count)), default=0)
        return largest / max(1, cv2.countNonZero(thick))

    def _search_again(self, image: npt.NDArray[np.uint8]) -> None:
        """Begin with this frame; what was shown stays where the new finding is alike."""
        old = self.view
        self._begin(image.shape)
        self._glimpses.add(thumb_of(grey_of(image)))
        found = decide(self._glimpses, image)
        keep = found is not None and old is not None and old.blank is None and _alike(found, old) >= 0.85
        self._use(old if keep else found)

    def _is_same(self, sample: Grey) -> bool:
        return self._sample is not None and np.array_equal(sample, self._sample)

    def _has_switched(self, sample: Grey) -> bool:
        if self._sample is None or self._outside is None or self._sample.shape != sample.shape:
            return False
        total = cv2.countNonZero(self._outside)
        moved = cv2.bitwise_and(cv2.absdiff(sample, self._sample), self._outside)
        return total > 0 and int(cv2.countNonZero(cv2.threshold(moved, MOVED, 255, 0)[1])) > SWITCHED * total


def _alike(one: View, other: View) -> float:
    union = cv2.countNonZero(cv2.bitwise_or(one.allowed, other.allowed))
    same_kind = (one.inside is None) == (other.inside is None)
    return cv2.countNonZero(cv2.bitwise_and(one.allowed, other.allowed)) / max(1, union) if same_kind else 0.0
