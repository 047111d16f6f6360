"""Which pictures are not worth asking about: black, in air, without contact, frozen; verdicts outlast a few frames."""

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.sector.view import CELLS, View, cells_of, sampled

FROZEN = "frozen"
BLACK = "black screen: no echoes"
IN_AIR = "the probe is in air"
POOR_CONTACT = "poor contact: much of the sector gets no echoes"

SAMPLED_PX = 160
DARK = 12  # grey levels
LIT_SHARE = 0.004  # of the sector brighter than dark: less is a black screen
NEAR_FACE = slice(0, 10)  # cells of depth in which the probe's own reverberations lie
DEEP = slice(14, None)  # cells of depth that they do not reach
AIR_DEEP = 0.15  # of the brightness near the face, at most, is left there
GROUPS = 8  # of beams, by which layers are compared
AIR_UNEVEN = 0.15  # of their brightness, groups of beams differ: air is the same under every element
AIR_ALIKE = 0.93  # correlation of every group but one with the mean of all
NEAR = slice(2, 9)  # cells of depth where a beam with contact has echoes
LOST_BEAMS = 0.5  # of the beams have none; poor pictures with fewer are still asked about
FROZEN_NS = 1_000_000_000
FROZEN_MEAN, FROZEN_PEAK = 0.6, 8.0  # grey levels that compression changes in a picture that stands: mean, 99.5 %
AGREEING = 3  # frames that say the same before a verdict changes


class FrameGate:
    """Judges the pictures of one feed."""

    def __init__(self) -> None:
        self._view: View | None = None
        self._cells = np.empty((0, 0), np.int32)
        self._deeper: npt.NDArray[np.int32] | None = None
        self._anchor: npt.NDArray[np.uint8] | None = None
        self._anchor_ns = 0
        self._said: str | None = None
        self._next: str | None = None
        self._agreed = -1  # nothing was said yet

    def judge(self, frame: Frame, view: View, *, shape_known: bool = True) -> str | None:
        """Return why nothing should be asked about a frame shown by `view`; None when it is fine.

        shape_known: beams and depths lie as `view` says; of a box around a sector, air and contact are not told.
        """
        sample = sampled(frame.image, SAMPLED_PX)
        if view is not self._view or self._cells.shape != sample.shape:
            self._view, self._cells, self._anchor = view, cells_of(view, *sample.shape), None
            self._deeper = _deeper(view, *sample.shape)
        settled = self._settled(self._tell(sample, shape_known), now=frame.still)
        frozen = self._is_frozen(sample, frame)
        return settled or (FROZEN if frozen else None)

    def _tell(self, sample: npt.NDArray[np.uint8], shape_known: bool) -> str | None:
        """What this picture alone tells."""
        if not shape_known:
            return BLACK if is_black(sample) else None
        found = verdict(sample, self._cells)
        if found is None and self._deeper is not None and verdict(sample, self._deeper) == IN_AIR:
            return IN_AIR
        return found

    def _settled(self, found: str | None, *, now: bool) -> str | None:
        if now or self._agreed < 0 or found == self._said:
            self._said, self._agreed = found, 0
        else:
            self._agreed = self._agreed + 1 if found == self._next else 1
            if self._agreed >= AGREEING:
                self._said, self._agreed = found, 0
        self._next = found
        return self._said

    def _is_frozen(self, sample: npt.NDArray[np.uint8], frame: Frame) -> bool:
        """Whether the sector has stood still for a second of a feed that should move."""
        if frame.still:
            return False
        inside = self._cells >= 0
        if self._anchor is not None and inside.any():
            change = cv2.absdiff(sample, self._anchor)[inside]
            if float(change.mean()) <= FROZEN_MEAN and float(np.quantile(change, 0.995)) <= FROZEN_PEAK:
                return frame.captured_ns - self._anchor_ns >= FROZEN_NS
        self._anchor, self._anchor_ns = sample, frame.captured_ns
        return False


def _deeper(view: View, height: int, width: int) -> npt.NDArray[np.int32] | None:
    """The cells of a sector that may reach further down than what was seen: what a probe in air shows first."""
    if view.outline is None or view.inside is not None:
        return None
    outline = msgspec.structs.replace(view.outline, bottom=float(view.allowed.shape[0]), bow=0.0)
    if outline.face > 0:
        outline = msgspec.structs.replace(outline, bow=1 / (1 / outline.face + outline.bottom - outline.top))
    return cells_of(msgspec.structs.replace(view, outline=outline), height, width)


def is_black(sample: npt.NDArray[np.uint8]) -> bool:
    """Whether next to nothing of a picture is lit."""
    return float((sample > DARK).mean()) < LIT_SHARE


def verdict(sample: npt.NDArray[np.uint8], cells: npt.NDArray[np.int32]) -> str | None:
    """Return what one picture alone tells; `cells` [height, width] as `cells_of` gives them."""
    inside = cells >= 0
    if not inside.any():
        return None
    values, where = sample[inside], cells[inside]
    if is_black(values):
        return BLACK
    counts = np.bincount(where, minlength=CELLS * CELLS)
    means = np.bincount(where, weights=values, minlength=CELLS * CELLS) / np.maximum(counts, 1)
    grid, known = means.reshape(CELLS, CELLS), (counts > 0).reshape(CELLS, CELLS)  # [depth, across]
    if is_air(grid, known):
        return IN_AIR
    beams, below = (
        np.where(known[part], grid[part], 0).sum(axis=0) / np.maximum(known[part].sum(axis=0), 1)
        for part in (NEAR, slice(NEAR.stop, None))
    )
    if beams.max() < 2 * DARK:
        return None  # dim all over: low gain, not contact
    lost = (beams < max(DARK, 0.15 * float(beams.max()))) & (below < max(DARK, 0.2 * float(below.max())))
    return POOR_CONTACT if float(lost.mean()) >= LOST_BEAMS else None


def is_air(grid: npt.NDArray[np.float64], known: npt.NDArray[np.bool_]) -> bool:
    """Whether there are layers near the face, alike under every element, and nothing below. [depth, across] each"""
    layers = np.where(known, grid, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)  # [depth]
    near, deep = float(layers[NEAR_FACE].max()), float(layers[DEEP].mean())
    if near < 2 * DARK or deep > max(DARK / 2, AIR_DEEP * near):
        return False
    if float(layers[2:].max()) < DARK:
        return True  # only the face itself rings
    uneven, alike = layering(grid, known)
    return uneven < AIR_UNEVEN and alike > AIR_ALIKE


def layering(grid: npt.NDArray[np.float64], known: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """How much groups of beams differ in brightness, of their mean, and how alike their profiles in depth are."""
    shape = (DEEP.start, GROUPS, CELLS // GROUPS)
    there = known[: DEEP.start].reshape(shape).sum(axis=2)
    beams = np.where(known, grid, 0)[: DEEP.start].reshape(shape).sum(axis=2) / np.maximum(there, 1)  # [depth, group]
    rows = (there > 0).all(axis=1)
    rows[0] = False  # the face rings as much with contact
    if rows.sum() < CELLS // 4:
        return np.inf, 0.0
    beams = beams[rows]
    sums = beams.mean(axis=0)
    own, common = beams - sums, beams.mean(axis=1, keepdims=True) - beams.mean()
    product = (own * common).sum(axis=0)
    alike = product / np.sqrt(np.maximum((own * own).sum(axis=0) * (common * common).sum(axis=0), 1e-9))
    return float(sums.std() / max(sums.mean(), 1e-9)), float(np.sort(alike)[1])
