"""Is the lesion, and what makes its kind, really seen in the finished frame? A label that noise has hidden is a false label."""

import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom.lesions import Placed

MIN_STEP = 17.0  # grey levels between a lesion and the tissue beside it
MIN_CONTRAST_TO_NOISE = 0.8
MIN_BEHIND = 9.0  # grey levels between the tissue behind a lesion and its neighbours


def visible(image: npt.NDArray[np.uint8], field: npt.NDArray[np.uint8], lesion: Placed) -> bool:
    """True when the lesion stands out of its bed and its shadow or enhancement can be seen.

    `image` [size, size] grey, `field` [size, size] 1 in the field of view.
    """
    scale = image.shape[0] / 224
    x, y, w, h = lesion.x, lesion.y, lesion.half_width, lesion.half_height
    side = 7 * scale

    def pixels(x0: float, x1: float, y0: float, y1: float) -> npt.NDArray[np.float32]:
        rows = slice(max(0, round(y0)), max(0, round(y1)))
        columns = slice(max(0, round(x0)), max(0, round(x1)))
        return image[rows, columns][field[rows, columns] > 0].astype(np.float32)

    beside = np.concatenate(
        [pixels(x - w - side, x - w - 1, y - 0.6 * h, y + 0.5 * h), pixels(x + w + 1, x + w + side, y - 0.6 * h, y + 0.5 * h)]
    )
    behind = pixels(x - 0.5 * w, x + 0.5 * w, y + h + 2 * scale, y + h + 0.09 * image.shape[0])
    flank = np.concatenate(
        [
            pixels(x - 1.7 * w, x - 1.15 * w, y + h + 2 * scale, y + h + 0.09 * image.shape[0]),
            pixels(x + 1.15 * w, x + 1.7 * w, y + h + 2 * scale, y + h + 0.09 * image.shape[0]),
        ]
    )
    if lesion.kind == "calcification":
        inside = pixels(x - 0.6 * w, x + 0.6 * w, y - 0.8 * h, y - 0.1 * h)
    else:
        inside = pixels(x - 0.6 * w, x + 0.6 * w, y - 0.6 * h, y + 0.6 * h)
    if min(len(beside), len(inside), len(behind), len(flank)) < 12:
        return lesion.kind == "oval_solid" and min(len(beside), len(inside)) >= 12 and _stands_out(inside, beside, 1.0)
    step = 1.0 if lesion.kind != "calcification" else -1.0
    if not _stands_out(inside, beside, step):
        return False
    difference = float(behind.mean() - flank.mean())
    if lesion.kind == "cyst":
        return difference > MIN_BEHIND
    if lesion.kind == "oval_solid":
        return True
    return difference < -MIN_BEHIND


def _stands_out(inside: npt.NDArray[np.float32], beside: npt.NDArray[np.float32], sign: float) -> bool:
    step = sign * float(beside.mean() - inside.mean())
    noise = float(np.sqrt((inside.var() + beside.var()) / 2)) + 1e-6
    return step > MIN_STEP and step / noise > MIN_CONTRAST_TO_NOISE
