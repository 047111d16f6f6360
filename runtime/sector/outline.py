"""The outline of a sector: straight edges that mirror each other, and a flat or round face and bottom.

Linear probes see a rectangle or a trapezoid, curved ones a ring's piece, phased ones a fan that begins at a point. In
all of them each column of the picture crosses the sector once: outlines are compared and searched as spans.
"""

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]

AXIS, HALF, SLOPE, TOP, BOTTOM, FACE, BOW = range(7)  # the numbers of an outline, in this order
PARALLEL = 0.02  # columns a row: edges that lean less are upright


class Outline(msgspec.Struct, frozen=True):
    """A sector; lengths in pixels, rows grow downwards.

    Its edges are `half` from `axis` at row `top` and move `slope` columns a row apart. The face crosses the axis at row
    `top` and the bottom at `bottom`; `face` and `bow` are their curvatures, the inverse of the radius (0: flat).
    """

    axis: float
    half: float
    slope: float
    top: float
    bottom: float
    face: float
    bow: float

    @property
    def shape(self) -> str:
        """What kind of probe makes such a sector."""
        if self.slope < 0.25 and self.face * self.half < 0.1:
            return "linear"
        return "phased" if self.half < 0.12 * (self.bottom - self.top) else "curved"

    @property
    def numbers(self) -> Floats:
        """The outline as a row for `spans`. [7]"""
        return np.array(msgspec.structs.astuple(self), np.float32)

    def scaled(self, factor: float) -> "Outline":
        """The outline in a picture that is `factor` times larger."""
        shift = (factor - 1) / 2  # pixel centres stand at whole numbers
        return Outline(
            self.axis * factor + shift,
            self.half * factor,
            self.slope,
            self.top * factor + shift,
            self.bottom * factor + shift,
            self.face / factor,
            self.bow / factor,
        )

    def inset(self, pixels: float) -> "Outline":
        """The outline with every bound moved inwards."""
        slanted = pixels * float(np.hypot(1, self.slope)) - pixels * self.slope
        return Outline(
            self.axis,
            max(self.half - slanted, 0.5),
            self.slope,
            self.top + pixels,
            self.bottom - pixels,
            self.face / (1 + pixels * self.face),
            self.bow / (1 - pixels * self.bow),
        )

    def mask(self, height: int, width: int) -> Mask:
        """255 inside. [height, width]"""
        top, bottom = spans(self.numbers[None], width)
        rows = np.arange(height, dtype=np.float32)[:, None]
        return np.where((rows >= top - 0.5) & (rows <= bottom + 0.5), 255, 0).astype(np.uint8)


def spans(outlines: Floats, width: int) -> tuple[Floats, Floats]:
    """First and last row of every column inside outlines [n, 7]; where none is, the first is below. [n, width]"""
    axis, half, slope, top, bottom, face, bow = (outlines[:, index : index + 1] for index in range(7))
    away = np.abs(np.arange(width, dtype=np.float32)[None, :] - axis)
    edge = top + (away - half) / np.maximum(slope, PARALLEL / 2)
    edge = np.where((slope < PARALLEL) & (away <= half), -1e6, edge)
    edge = np.where((slope < PARALLEL) & (away > half), 1e6, edge)
    return (
        np.asarray(np.maximum(top - _sag(away, face), edge), np.float32),
        np.asarray(bottom - _sag(away, bow), np.float32),
    )


def _sag(away: Floats, curvature: Floats) -> Floats:
    """How far a circle has risen `away` from its lowest point."""
    turned = np.minimum(away * curvature, 1.0)
    return np.asarray(away * turned / (1 + np.sqrt(1 - turned * turned)), np.float32)


def shrunk(values: npt.NDArray[np.uint8], width: int, height: int) -> npt.NDArray[np.uint8]:
    """Means of areas. [height, width]"""
    return np.asarray(cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
