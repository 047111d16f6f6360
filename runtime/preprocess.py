"""From a picture to the patches that the vision tower reads, as Qwen2-VL's own image processor makes them."""

import functools
import math

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from sonoedge.bundle import ImageSpec
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame

__all__ = ["ImageSpec", "Patches", "crop_to_sector", "preprocess", "smart_resize"]

MAX_ASPECT_RATIO = 200  # Qwen2-VL's own limit


class Patches(msgspec.Struct, frozen=True):
    """The patches of one picture; `grid` counts them as (time, height, width) before merging."""

    values: npt.NDArray[np.float32]  # [t*h*w, channels * temporal_patch_size * patch_size**2]
    grid: tuple[int, int, int]

    def merged(self, merge_size: int) -> int:
        """How many tokens the language model sees."""
        t, h, w = self.grid
        return t * h * w // merge_size**2


def smart_resize(height: int, width: int, spec: ImageSpec) -> tuple[int, int]:
    """Return the (height, width) in pixels that a picture is resized to, both multiples of patch_size * merge_size.

    Raises SonoEdgeError for a picture more than 200 times longer than wide. Source: Qwen2-VL's image processor.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise SonoEdgeError(
            f"the picture is {width}x{height} pixels, more than {MAX_ASPECT_RATIO} times longer than wide: "
            "crop it to the ultrasound sector first"
        )
    factor = spec.patch_size * spec.merge_size
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    if new_height * new_width > spec.max_pixels:
        shrink = math.sqrt(height * width / spec.max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < spec.min_pixels:
        grow = math.sqrt(spec.min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def preprocess(image: npt.NDArray[np.uint8], spec: ImageSpec) -> Patches:
    """Resize, normalise and cut one RGB picture [height, width, 3] into patches, merge blocks together.

    Raises SonoEdgeError when the picture is not uint8 RGB or is too long and thin.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SonoEdgeError(f"a picture is {image.dtype} {list(image.shape)}: give uint8 [height, width, 3], RGB")
    small = resized(image, spec)
    height, width = small.shape[:2]
    normal = cv2.LUT(small, _normalisation(spec.mean, spec.std))  # float32 [height, width, 3]
    p, m, t = spec.patch_size, spec.merge_size, spec.temporal_patch_size
    grid_h, grid_w = height // p, width // p
    blocks = normal.reshape(grid_h // m, m, p, grid_w // m, m, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    values = np.empty((grid_h // m, grid_w // m, m, m, 3, t, p, p), np.float32)
    values[...] = blocks[:, :, :, :, :, None]  # a still picture fills every temporal slot
    return Patches(values.reshape(grid_h * grid_w, 3 * t * p * p), (1, grid_h, grid_w))


def resized(image: npt.NDArray[np.uint8], spec: ImageSpec) -> npt.NDArray[np.uint8]:
    """Return the picture [height, width, 3] at the size the model reads, still uint8."""
    return _resize(image, *smart_resize(image.shape[0], image.shape[1], spec))


def crop_to_sector(frame: Frame) -> npt.NDArray[np.uint8]:
    """Return the ultrasound region of the frame [height, width, 3], or the whole picture when the feed names none."""
    if frame.sector is None:
        return frame.image
    x0, y0, x1, y1 = frame.sector
    return np.ascontiguousarray(frame.image[y0:y1, x0:x1])


def _resize(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.uint8]:
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    # Pillow filters over the whole footprint when it shrinks; OpenCV's bicubic does not, and differs visibly.
    if _is_grey(image):  # one plane costs a third
        plane = Image.fromarray(np.ascontiguousarray(image[:, :, 0])).resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(cv2.cvtColor(np.asarray(plane), cv2.COLOR_GRAY2RGB))
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _is_grey(image: npt.NDArray[np.uint8]) -> bool:
    sparse = image[::16, ::16]
    if (sparse[:, :, 0] != sparse[:, :, 1]).any():  # most colour pictures end here
        return False
    red, green, blue = cv2.split(image)
    return bool(np.array_equal(red, green) and np.array_equal(green, blue))


@functools.lru_cache(maxsize=8)
def _normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """Every value that a normalised pixel can have, rounded as transformers rounds it: [1, 256, 3]."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]  # [256, 1]
    table = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)  # [256, 3]
    return np.ascontiguousarray(table[None], np.float32)
