"""The tissue plane that anatomy and lesions are drawn on: echo level, reflectors, attenuation and the organ."""

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import noise
from sonoedge.calibration.phantom.geometry import Geometry

Floats = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]  # [n, 2] x, y in pixels

_SHIFT = 4  # fractional bits of OpenCV's drawing coordinates
_ACROSS = np.linspace(-1.15, 1.15, 25)
_AROUND = np.linspace(0, 2 * np.pi, 44, endpoint=False)
_COS, _SIN = np.cos(_AROUND), np.sin(_AROUND)
_LEVELS = 7  # steps of brightness along a reflector
SPECULAR_FULL = 9.0  # amplitude of a reflector drawn at 255


class Canvas:
    """Echo level in dB around mid-grey tissue, reflectors, excess attenuation in dB a pixel, and the organ mask."""

    def __init__(self, geometry: Geometry, rng: np.random.Generator, background_db: float) -> None:
        size = geometry.size
        self.geometry = geometry
        self.rng = rng
        self.size = size
        self.scale = size / 224
        self.echo_db: Floats = np.full((size, size), background_db, np.float32)
        self.specular: npt.NDArray[np.uint8] = np.zeros((size, size), np.uint8)
        self.attenuation: Floats = np.zeros((size, size), np.float32)
        self.organ: npt.NDArray[np.uint8] = np.zeros((size, size), np.uint8)
        self.bed_db = 0.0  # echo level of the tissue that surrounds a lesion
        self.cavities = False  # the organ holds blood: lesions grow from its wall and are brighter than blood
        self.bed_px = 7.0  # width of the bed at 224
        self.largest_lesion = 40.0  # radius in pixels at 224
        self.pulse: tuple[float, float, float] | None = None  # x, y, radius of what contracts in a clip

    def at(self, u: float, v: float) -> tuple[float, float]:
        """Pixel of a place in the field of view: u from -1 (left) to 1, v from 0 (probe) to 1."""
        x0, y0, x1, y1 = self.geometry.box
        return x0 + (u + 1) / 2 * (x1 - x0), y0 + v * (y1 - y0)

    def px(self, length: float) -> float:
        """A length given at 224 pixels, at this frame's size."""
        return length * self.scale

    def curve(self, height: float, sag: float = 0.0, wave: float = 0.0, tilt: float = 0.0) -> Points:
        """A line across the field at depth `height`, all in fractions of the depth; left to right. [25, 2]"""
        u = _ACROSS
        phase = self.rng.uniform(0, 2 * np.pi, 2)
        v = height + sag * u**2 + tilt * u
        v = v + wave * (np.sin(2.6 * u + phase[0]) + 0.5 * np.sin(6.1 * u + phase[1]))
        x0, y0, x1, y1 = self.geometry.box
        return np.stack([x0 + (u + 1) / 2 * (x1 - x0), y0 + v * (y1 - y0)], axis=1)

    def blob(self, x: float, y: float, rx: float, ry: float, angle: float = 0.0, rough: float = 0.05) -> Points:
        """A closed outline around (x, y): an ellipse with slow bumps of relative height `rough`. [44, 2]"""
        t = _AROUND
        phase = self.rng.uniform(0, 2 * np.pi, 3)
        r = 1 + rough * (np.sin(2 * t + phase[0]) + 0.7 * np.sin(3 * t + phase[1]) + 0.4 * np.sin(5 * t + phase[2]))
        px, py = rx * r * _COS, ry * r * _SIN
        c, s = np.cos(angle), np.sin(angle)
        return np.stack([x + c * px - s * py, y + s * px + c * py], axis=1)

    def fill(self, outline: Points, echo_db: float, attenuation: float = 0.0) -> None:
        """Set the tissue inside an outline."""
        points = [fixed(outline)]
        cv2.fillPoly(self.echo_db, points, echo_db, shift=_SHIFT)
        cv2.fillPoly(self.attenuation, points, attenuation, shift=_SHIFT)

    def mark(self, outline: Points) -> None:
        """Add what is inside an outline to the organ."""
        cv2.fillPoly(self.organ, [fixed(outline)], 1, shift=_SHIFT)

    def unmark(self, outline: Points) -> None:
        """Take what is inside an outline from the organ: something else covers it."""
        cv2.fillPoly(self.organ, [fixed(outline)], 0, shift=_SHIFT)

    def band(self, upper: Points, lower: Points, echo_db: float, attenuation: float = 0.0) -> Points:
        """Set the tissue between two curves; returns the outline."""
        outline = np.concatenate([upper, lower[::-1]])
        self.fill(outline, echo_db, attenuation)
        return outline

    def stroke(self, points: Points, echo_db: float, width: float) -> None:
        """Set the tissue along an open curve, `width` pixels at 224."""
        width_px = max(1, round(self.px(width)))
        cv2.polylines(self.echo_db, [fixed(points)], False, echo_db, width_px, cv2.LINE_8, _SHIFT)

    def reflect(self, points: Points, amplitude: float, width: float = 1.4, *, closed: bool = False) -> None:
        """Draw a mirror-like boundary: bright where it faces the probe, faint where it runs along the beam."""
        if closed:
            points = np.concatenate([points, points[:1]])
        step = points[1:] - points[:-1]
        facing = step[:, 0] ** 2 / np.maximum(step[:, 0] ** 2 + step[:, 1] ** 2, 1e-9)
        level = np.rint(facing * _LEVELS).astype(int)
        width_px = max(1, round(self.px(width)))
        nodes = fixed(points)
        turns = [0, *(np.flatnonzero(level[1:] != level[:-1]) + 1).tolist(), len(level)]
        for start, end in pairwise(turns):
            value = min(255, int(255 * amplitude / SPECULAR_FULL * (0.22 + 0.78 * level[start] / _LEVELS)))
            cv2.polylines(self.specular, [nodes[start : end + 1]], False, value, width_px, cv2.LINE_AA, _SHIFT)

    def erase_reflectors(self, outline: Points) -> None:
        """Remove boundaries inside an outline, where something grew over them."""
        cv2.fillPoly(self.specular, [fixed(outline)], 0, shift=_SHIFT)

    def texture(self, deviation_db: float, cells: int, outlines: Sequence[Points] = ()) -> None:
        """Vary the echo level slowly, everywhere or inside the outlines."""
        slow = noise.smooth(self.rng, self.size, self.size, cells) * np.float32(deviation_db)
        if outlines:
            mask = np.zeros((self.size, self.size), np.uint8)
            cv2.fillPoly(mask, [fixed(o) for o in outlines], 1, shift=_SHIFT)
            slow *= mask
        self.echo_db += slow


def fixed(points: Points) -> npt.NDArray[np.int32]:
    """Pixel coordinates as OpenCV's fixed-point numbers (pixel centres at whole numbers)."""
    return np.round(points * (1 << _SHIFT)).astype(np.int32)


def lowered(points: Points, length_px: float) -> Points:
    """The same points further from the probe (nearer where negative)."""
    return np.asarray(points + np.array([0.0, length_px]))


def polygon_mask(points: Points, size: int) -> npt.NDArray[np.uint8]:
    """1 inside a closed outline. [size, size]"""
    mask = np.zeros((size, size), np.uint8)
    cv2.fillPoly(mask, [fixed(points)], 1, shift=_SHIFT)
    return mask
