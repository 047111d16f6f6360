"""How much each place of a screen looks like live tissue: brightness over the ground, thickness, texture, change."""

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.sector.outline import Floats, Mask, shrunk

Grey = npt.NDArray[np.uint8]

THUMB_PX = 256  # longest side of the pictures that are searched
STRONG = (1.5, 7.5)  # grey levels from the ground: nothing, surely something
FAINT = (0.3, 1.3)  # where the ground is free of compression noise
CHANGE_FRAMES = 4  # and more tell speckle from what stands still
THICK = 0.036  # of the longest side: lines of text are thinner
HOLE_SHARE = 0.0005  # of the picture
FLAT_RANGE = 1  # grey levels in a panel
PANEL_SHARE = 0.004  # of the picture: an even surface at least so large is a panel
WHITE_SHARE = 0.03
PANEL_CONTRAST = 5
CHANGED = 5  # grey levels within some frames, more than compression makes


class Evidence(msgspec.Struct, frozen=True, eq=False):
    """What is known of a screen, all [height, width] of a thumb."""

    something: Floats  # 0 the ground, 1 surely not
    changed: Mask  # 1 where the frames differ by more than compression makes
    thick: Mask  # 1 where something fills area as tissue does; pieces of text and lines are left out
    panels: Mask  # 1 where it is one even colour
    ground: int


class Glimpses:
    """Thumbs of the newest frames in constant memory: the brightest and darkest value of each place."""

    def __init__(self) -> None:
        self.frames = 0
        self.high: Grey | None = None
        self.low: Grey | None = None

    def add(self, thumb: Grey) -> None:
        """Take one more thumb [height, width]."""
        if self.high is None or self.low is None:
            self.high, self.low = thumb.copy(), thumb.copy()
        else:
            cv2.max(self.high, thumb, self.high)
            cv2.min(self.low, thumb, self.low)
        self.frames += 1


def grey_of(image: npt.NDArray[np.uint8]) -> Grey:
    """Return the brightest channel of a picture [height, width, 3]: coloured writing is as visible as white."""
    red, green, blue = cv2.split(image)
    return np.asarray(cv2.max(cv2.max(red, green), blue), np.uint8)


def thumb_of(grey: Grey) -> Grey:
    """Return the picture with its longest side at most 256 pixels, by means of areas."""
    shrink = max(1.0, max(grey.shape) / THUMB_PX)
    if shrink == 1:
        return np.ascontiguousarray(grey)
    height, width = (max(1, round(side / shrink)) for side in grey.shape)
    return shrunk(grey, width, height)


def ground_of(thumb: Grey) -> tuple[int, float]:
    """Return the commonest grey level, three neighbours counted together, and its share of the rim."""
    alone = np.bincount(thumb.ravel(), minlength=256)
    counts = np.convolve(alone, (1, 1, 1), "same")
    rim = np.concatenate([thumb[0], thumb[-1], thumb[:, 0], thumb[:, -1]])
    rims = np.convolve(np.bincount(rim, minlength=256), (1, 1, 1), "same")
    level = int(np.argmax(counts / counts.sum() + rims / rims.sum()))
    share = float(rims[level] / rim.size)
    near = alone[max(0, level - 1) : level + 2]
    return max(0, level - 1) + int(np.argmax(near)), share


def evidence(glimpses: Glimpses) -> list[Evidence]:
    """Return what the glimpses tell, the plainest first: strong contrast, then faint contrast, then faint change."""
    assert glimpses.high is not None
    assert glimpses.low is not None
    high, low = glimpses.high, glimpses.low
    ground, _ = ground_of(low)
    level = np.full_like(high, ground)
    contrast = np.asarray(cv2.max(cv2.absdiff(high, level), cv2.absdiff(low, level)), np.uint8)
    changed = np.asarray(cv2.subtract(high, low), np.uint8)
    moved = np.asarray(changed > CHANGED, np.uint8)
    panels = _panels(low, ground, changed)
    kinds = [_ramp(np.maximum(contrast, changed), STRONG), _ramp(contrast, FAINT)]
    if glimpses.frames >= CHANGE_FRAMES and changed.any():
        kinds.append(_ramp(changed, FAINT))
    return [Evidence(something, moved, _thick(something, panels), panels, ground) for something in kinds]


def _ramp(values: Grey, between: tuple[float, float]) -> Floats:
    low, high = between
    return np.asarray(np.clip((np.asarray(values, np.float32) - low) / (high - low), 0, 1), np.float32)


def _thick(something: Floats, panels: Mask) -> Mask:
    solid = _filled(np.asarray((something > 0.3) & (panels == 0), np.uint8))
    size = _odd(THICK * max(solid.shape))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    framed = cv2.copyMakeBorder(solid, size, size, size, size, cv2.BORDER_REPLICATE)
    opened = cv2.morphologyEx(framed, cv2.MORPH_OPEN, disc)
    return np.ascontiguousarray(opened[size:-size, size:-size], np.uint8)


def _panels(low: Grey, ground: int, changed: Grey) -> Mask:
    """1 on even surfaces brighter than the ground or at the picture's rim, and on what is written on them."""
    window = np.ones((5, 5), np.uint8)
    spread = cv2.subtract(cv2.dilate(low, window), cv2.erode(low, window))
    contrast = cv2.absdiff(low, np.full_like(low, ground))
    even = (np.asarray(spread) <= FLAT_RANGE) & (contrast >= PANEL_CONTRAST) & (changed <= CHANGED)
    grown = cv2.dilate(even.astype(np.uint8), window)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(np.asarray(grown, np.uint8))
    panels, (height, width) = np.zeros_like(low), low.shape
    reach = _odd(0.08 * max(low.shape))  # words on a panel are holes in it
    for index in range(1, count):
        x, y, w, h, area = (int(value) for value in stats[index])
        at_rim = x <= 1 or y <= 1 or x + w >= width - 1 or y + h >= height - 1
        part = np.asarray(labels[y : y + h, x : x + w] == index, np.uint8)
        bright = float(low[y : y + h, x : x + w][part > 0].mean()) > ground
        white = float(low[y : y + h, x : x + w][part > 0].mean()) > 245  # echoes may be as bright, over small areas
        if area < (WHITE_SHARE if white else PANEL_SHARE) * low.size or not (at_rim or bright):
            continue
        filled = cv2.morphologyEx(part, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8))
        panels[y : y + h, x : x + w] |= np.asarray(filled, np.uint8)
    return panels


def _filled(solid: Mask) -> Mask:
    """The mask without small holes: tissue has dark grains, lines of text have gaps that reach around them."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(1 - solid, connectivity=4)
    small = np.asarray(stats[:, cv2.CC_STAT_AREA] <= HOLE_SHARE * solid.size, np.uint8)
    small[0] = 0  # the mask itself
    return np.asarray(solid | small[labels], np.uint8)


def _odd(length: float) -> int:
    return 2 * round(max(length, 3) / 2 - 0.5) + 1
