"""Is the lesion, and what makes its kind, seen in the finished frame? A label that noise has hidden is false."""

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom.lesions import Placed

MIN_STEP = 19.0  # grey levels between a lesion and the tissue around it
MIN_STEP_EACH = 12.0  # and the tissue on its left, on its right and above it alone
MIN_CONTRAST_TO_NOISE = 0.8
MIN_BEHIND = 9.0  # grey levels between what lies behind a lesion and what lies beside that
_FEW = 12  # pixels that a mean needs

Grey = npt.NDArray[np.uint8]


def visible(image: Grey, field: Grey, lesion: Placed) -> bool:
    """True when the lesion stands out of its bed all around and its shadow or enhancement can be seen.

    `image` [size, size] grey, `field` [size, size] 1 in the field of view.
    """
    return _stands_out(image, field, lesion) and _marks_what_lies_behind(image, field, lesion)


def _stands_out(image: Grey, field: Grey, lesion: Placed) -> bool:
    scale = image.shape[0] / 224
    reach = round(6 * scale)
    y0, y1 = max(0, int(lesion.y - lesion.half_height) - reach), int(lesion.y + lesion.half_height) + reach + 2
    x0, x1 = max(0, int(lesion.x - lesion.half_width) - reach), int(lesion.x + lesion.half_width) + reach + 2
    mask, grey = lesion.mask[y0:y1, x0:x1], image[y0:y1, x0:x1]
    near = cv2.dilate(mask, _disc(round(1.5 * scale))) > 0
    ring = (cv2.dilate(mask, _disc(reach)) > 0) & ~near & (field[y0:y1, x0:x1] > 0)
    rows, columns = np.ogrid[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
    u, v = (columns - lesion.x) / lesion.half_width, (rows - lesion.y) / lesion.half_height
    ring &= v < 0.6  # not what lies behind
    if lesion.kind == "calcification":
        sign, core = -1.0, mask.astype(bool) & (v < -0.1) & (np.abs(u) < 0.7)
    else:
        sign, core = 1.0, cv2.erode(mask, _disc(round(2.5 * scale))).astype(bool)
    inside = grey[core].astype(np.float32)
    around = grey[ring].astype(np.float32)
    if min(inside.size, around.size) < _FEW:
        return False
    level = float(inside.mean())
    noise = float(np.sqrt((inside.var() + around.var()) / 2)) + 1e-6
    step = sign * (float(around.mean()) - level)
    if step < MIN_STEP or step / noise < MIN_CONTRAST_TO_NOISE:
        return False
    for part in (ring & (u < -0.4), ring & (u > 0.4), ring & (v < -0.4)):
        beside = grey[part]
        if beside.size < _FEW or sign * (float(beside.mean()) - level) < MIN_STEP_EACH:
            return False
    return True


def _marks_what_lies_behind(image: Grey, field: Grey, lesion: Placed) -> bool:
    if lesion.kind == "oval_solid":
        return True
    size = image.shape[0]
    x, w = lesion.x, lesion.half_width
    top, bottom = lesion.y + lesion.half_height + 0.01 * size, lesion.y + lesion.half_height + 0.1 * size

    def pixels(left: float, right: float) -> npt.NDArray[np.float32]:
        rows, columns = slice(round(top), round(bottom)), slice(max(0, round(left)), max(0, round(right)))
        return image[rows, columns][field[rows, columns] > 0].astype(np.float32)

    behind = pixels(x - 0.5 * w, x + 0.5 * w)
    flanks = np.concatenate([pixels(x - 1.7 * w, x - 1.15 * w), pixels(x + 1.15 * w, x + 1.7 * w)])
    if min(behind.size, flanks.size) < _FEW:
        return False
    difference = float(behind.mean()) - float(flanks.mean())
    return difference > MIN_BEHIND if lesion.kind == "cyst" else difference < -MIN_BEHIND


def _disc(radius: int) -> Grey:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)), np.uint8)
