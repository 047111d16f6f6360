"""What a phantom frame really shows: the ids of regions, kinds and qualities, and the truth structs that carry them."""

from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

REGIONS = ("breast", "gynaecology", "heart", "kidney", "liver", "thyroid", "vessel")
UNTRAINED_REGIONS = ("lung", "musculoskeletal")
KINDS = ("cyst", "oval_solid", "irregular_solid", "calcification")
QUALITIES = ("good", "poor")
GEOMETRIES = ("linear", "curved", "sector")

Side = Literal["left", "right"]


class Lesion(msgspec.Struct, frozen=True):
    """One lesion as it lies in the image; lengths in pixels are at the frame's own size."""

    kind: str
    side: Side
    radius_px: float  # of the circle of equal area
    size_mm: float  # largest diameter
    depth_mm: float  # of the centre, along the beam from the probe face
    centre_px: tuple[float, float]  # x, y


class Truth(msgspec.Struct, frozen=True):
    """Everything that is known about one frame."""

    region: str
    quality: str
    geometry: str
    spacing_mm: float  # millimetres a pixel
    lesion: Lesion | None
    seed: int
    size: int


class Phantom(msgspec.Struct, frozen=True, eq=False):
    """One synthetic frame with its exact truth."""

    image: npt.NDArray[np.uint8]  # [size, size, 3] RGB, grey
    lesion_mask: npt.NDArray[np.bool_]  # [size, size]
    organ_mask: npt.NDArray[np.bool_]  # [size, size]
    truth: Truth
