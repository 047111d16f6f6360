"""What of a screen is shown: all of it where it is sector alone, else what lies inside the sector's outline."""

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.sector.find import Found, coordinates, find
from sonoedge.runtime.sector.live_area import Evidence, Glimpses, Grey, evidence, grey_of
from sonoedge.runtime.sector.outline import Floats, Mask, Outline

HALF_PIXEL = 0.4  # of the searched thumb: a place counts as lit when a sliver of it is
RIM_REACHED = 0.5  # of a side: tissue that reaches so much of three sides fills the picture
TOP_REACHED, SIDE_REACHED = 0.8, 0.25  # or nearly all of the top, and both sides before the echoes fade
BLANK = 24  # grey levels from the ground; up to twice that, single grains of the sector's dim flanks may be, no letters
GRAIN_PX = 8
LONG = 0.1  # of the longest side: a letter is shorter
AROUND = 0.012  # of the longest side, about the tissue, in which a bare picture may change
COLOURED = 40  # difference of the channels
MOST_COLOURED = 0.6  # of the sector: flow images are coloured in a box, photographs and desktops all over
LEAST_TEXTURE = 0.35  # grey levels from the mean of the neighbours, of speckle at its smoothest
CAPTURED = 0.95  # of the tissue is inside
FILLED = 0.3  # of the outline is filled
SUPPORT = 0.55  # of its rim is
RIVAL = 0.2  # of what is thick inside: another thick piece so large may be sector too
SHARE = 0.03  # of the picture: smaller is not a sector that anybody looks at
SMALLEST_PX = 12  # sides of pictures in which nothing can be found
CELLS = 24  # depths and places across by which the gate sees a sector


class View(msgspec.Struct, frozen=True, eq=False):
    """How pictures of one size are shown; `outline` is on the picture's own scale, None where all of it is sector."""

    outline: Outline | None
    box: tuple[int, int, int, int]  # x0, y0, x1, y1 of what is shown
    inside: Mask | None  # [y1 - y0, x1 - x0, 3] 255 where it is shown; None: everywhere
    blank: Mask | None  # [height, width] 255 where a whole picture must stay blank; None: nowhere
    ground: int
    allowed: Mask  # [height, width] 255 where the sector is
    clear: bool = True  # more frames would not tell more

    def is_blank_outside(self, image: npt.NDArray[np.uint8]) -> bool:
        """Whether a picture that is shown whole still holds nothing beside its sector."""
        if self.blank is None:
            return True
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        low, high, _, _ = cv2.minMaxLoc(grey, self.blank)
        contrast = max(high - self.ground, self.ground - low)
        if contrast <= BLANK or contrast > 2 * BLANK:
            return contrast <= BLANK
        lit = cv2.bitwise_and(cv2.absdiff(grey, np.full_like(grey, self.ground)), self.blank)
        _, _, stats, _ = cv2.connectedComponentsWithStats(np.asarray(np.asarray(lit) > BLANK, np.uint8))
        return bool((stats[1:, cv2.CC_STAT_AREA] <= GRAIN_PX).all())

    def of(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return what is shown of a picture [height, width, 3], in memory of its own unless it is all of it."""
        x0, y0, x1, y1 = self.box
        if self.inside is None:
            return image if (x0, y0, y1, x1) == (0, 0, *image.shape[:2]) else image[y0:y1, x0:x1].copy()
        return np.asarray(cv2.bitwise_and(image[y0:y1, x0:x1], self.inside), np.uint8)


def whole(shape: tuple[int, ...], blank: Mask | None = None, ground: int = 0, outline: Outline | None = None) -> View:
    """Show the whole of pictures [height, width, 3]."""
    height, width = shape[:2]
    allowed = np.full((height, width), 255, np.uint8) if outline is None else outline.mask(height, width)
    return View(outline, (0, 0, width, height), None, blank, ground, allowed)


def decide(glimpses: Glimpses, image: npt.NDArray[np.uint8]) -> View | None:
    """Return how to show pictures like `image`, the newest of the glimpses; None when that is unsure."""
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST_PX:
        return None
    kinds = evidence(glimpses)
    plain = kinds[0]
    if not plain.thick.any() or not _is_textured(glimpses, plain.thick) or _is_coloured(image, plain.thick):
        return None
    if _fills(plain):
        return whole(image.shape)
    found = find(kinds)
    outline = _own_scale(found, plain, image) if found is not None else None
    about = _about(plain, outline, image.shape)  # in a bare picture an outline that is not sure does no harm
    blank = np.asarray(cv2.bitwise_not(about), np.uint8)
    bare = whole(image.shape, blank, plain.ground, outline)
    if bare.is_blank_outside(image):
        return bare
    if outline is None or found is None or not _is_sure(found) or _has_rival(found, plain):
        return None
    mask = outline.mask(height, width)
    x, y, wide, high = cv2.boundingRect(mask)
    inside = cv2.merge([mask[y : y + high, x : x + wide]] * 3)
    return View(
        outline, (x, y, x + wide, y + high), np.asarray(inside, np.uint8), None, plain.ground, mask, found.is_clear
    )


def cells_of(view: View, height: int, width: int) -> npt.NDArray[np.int32]:
    """The cell of depth and place across of each pixel of a thinned picture, -1 outside the sector. [height, width]"""
    scale = width / view.allowed.shape[1]
    if view.outline is None:
        depth: Floats = np.broadcast_to((np.arange(height, dtype=np.float32)[:, None] + 0.5) / height, (height, width))
        across: Floats = np.broadcast_to((np.arange(width, dtype=np.float32) + 0.5) / width * 2 - 1, (height, width))
    else:
        depth, across = coordinates(view.outline.scaled(scale), height, width)
    inside = (depth >= 0) & (depth < 1) & (across >= -1) & (across < 1)
    cells = (depth * CELLS).astype(np.int32) * CELLS + ((across + 1) / 2 * CELLS).astype(np.int32)
    return np.where(inside, cells, -1).astype(np.int32)


def _fills(plain: Evidence) -> bool:
    """Whether tissue reaches three sides of the picture: then it has been cropped before."""
    lit = (plain.something > 0.3) & (plain.panels == 0)
    _, labels = cv2.connectedComponents(np.asarray(lit, np.uint8))
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    main = labels == int(np.argmax(counts))
    sides = (main[:2].any(axis=0), main[-2:].any(axis=0), main[:, :2].any(axis=1), main[:, -2:].any(axis=1))
    top, _, left, right = reached = [float(side.mean()) for side in sides]
    fades = top > TOP_REACHED and min(left, right) > SIDE_REACHED
    return fades or sum(share >= RIM_REACHED for share in reached) >= 3


def _is_sure(found: Found) -> bool:
    return found.captured >= CAPTURED and found.filled >= FILLED and found.support >= SUPPORT and found.share >= SHARE


def _has_rival(found: Found, plain: Evidence) -> bool:
    inside = found.outline.mask(*plain.thick.shape)
    outside = np.asarray(cv2.dilate(inside, np.ones((5, 5), np.uint8)) == 0, np.uint8) & plain.thick
    count, _, stats, _ = cv2.connectedComponentsWithStats(outside)
    largest = max((int(stats[index, cv2.CC_STAT_AREA]) for index in range(1, count)), default=0)
    return largest > RIVAL * cv2.countNonZero(cv2.bitwise_and(plain.thick, plain.thick, mask=inside))


def _own_scale(found: Found, plain: Evidence, image: npt.NDArray[np.uint8]) -> Outline:
    return found.outline.inset(HALF_PIXEL).scaled(max(image.shape[:2]) / max(plain.thick.shape))


def _about(plain: Evidence, outline: Outline | None, shape: tuple[int, ...]) -> Mask:
    """255 about the sector and what hangs together with it; writing stands apart. [height, width]"""
    height, width = shape[:2]
    size = plain.thick.shape
    lit = np.asarray((plain.something > 0.3) & (plain.panels == 0), np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(lit)
    _, cores, core_stats, _ = cv2.connectedComponentsWithStats(plain.thick)
    areas = core_stats[:, cv2.CC_STAT_AREA].astype(np.float64)
    areas[0] = 0
    hull = _hull(np.asarray(np.isin(cores, np.flatnonzero(areas >= 0.15 * areas.max())), np.uint8))
    if outline is not None:
        hull = hull | (outline.scaled(max(size) / max(shape[:2])).mask(*size) > 0).astype(np.uint8)
    near = np.ones((2 * round(AROUND * max(size)) + 1,) * 2, np.uint8)
    long = stats[:, 2:4].max(axis=1) >= LONG * max(size)
    long[0] = False
    for _ in range(2):
        touching = np.unique(labels[cv2.dilate(hull, near) > 0])
        pieces = np.isin(labels, touching[long[touching]])
        hull = _hull(hull | pieces.astype(np.uint8))
    grown = np.asarray(cv2.dilate(hull, near), np.uint8) * np.uint8(255)
    return np.asarray(cv2.resize(grown, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def _hull(mask: Mask) -> Mask:
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return np.asarray(cv2.fillConvexPoly(np.zeros_like(mask), cv2.convexHull(np.concatenate(contours)), (1,)), np.uint8)


def _is_textured(glimpses: Glimpses, thick: Mask) -> bool:
    assert glimpses.high is not None
    smooth = cv2.absdiff(glimpses.high, cv2.blur(glimpses.high, (5, 5)))
    return float(np.asarray(smooth)[thick > 0].mean()) >= LEAST_TEXTURE


def _is_coloured(image: npt.NDArray[np.uint8], thick: Mask) -> bool:
    height, width = thick.shape
    small = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)
    red, green, blue = cv2.split(small)
    least = cv2.min(cv2.min(red, green), blue)
    return bool((np.asarray(cv2.subtract(grey_of(small), least))[thick > 0] > COLOURED).mean() > MOST_COLOURED)


def sample_step(shape: tuple[int, ...], longest: int) -> int:
    """Every how many pixels a picture is sampled so that its longest side has at most `longest`."""
    return -(-max(shape[:2]) // longest)


def sampled(image: npt.NDArray[np.uint8], longest: int) -> Grey:
    """Return single pixels of a picture, grey."""
    step = sample_step(image.shape, longest)
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(image[::step, ::step]), cv2.COLOR_RGB2GRAY), np.uint8)
