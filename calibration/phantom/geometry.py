"""Linear, curved and sector probes: maps between the image plane and beam space, computed once a geometry."""

from functools import lru_cache

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom.truth import GEOMETRIES

Floats = npt.NDArray[np.float32]

BANK = 72  # distinct geometries a size; a multiple of len(GEOMETRIES)


class Geometry(msgspec.Struct, frozen=True, eq=False):
    """One probe shape; beam space is [samples, beams], the image plane [size, size]."""

    name: str
    size: int
    depth_px: float  # from the probe face to the deepest sample
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 of the field of view in pixels
    plane_x: Floats  # [samples, beams] image x of every sample
    plane_y: Floats  # [samples, beams]
    beam_x: Floats  # [size, size] beam of every pixel
    beam_y: Floats  # [size, size] sample of every pixel
    field: npt.NDArray[np.uint8]  # [size, size] 1 inside the field of view

    @property
    def samples(self) -> int:
        return int(self.plane_x.shape[0])

    @property
    def beams(self) -> int:
        return int(self.plane_x.shape[1])

    def to_image(self, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Scan-convert [samples, beams] to [size, size], zero outside the field of view."""
        image = cv2.remap(
            values, self.beam_x, self.beam_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0.0
        )
        return np.asarray(image, dtype=np.uint8)

    def depth_at(self, x: float, y: float) -> float:
        """Depth under the probe face, in pixels, of an image point."""
        row, column = min(max(round(y), 0), self.size - 1), min(max(round(x), 0), self.size - 1)
        return float(self.beam_y[row, column]) / (self.samples - 1) * self.depth_px


@lru_cache(maxsize=2 * BANK)
def geometry(index: int, size: int) -> Geometry:
    """The probe number `index` of the bank, for frames of `size` pixels."""
    rng = np.random.Generator(np.random.SFC64(7_000 + index))
    name = GEOMETRIES[index % len(GEOMETRIES)]
    samples, beams = size, max(8, round(size * rng.uniform(0.62, 0.8)))
    u = np.linspace(-1.0, 1.0, beams, dtype=np.float32)[None, :]
    v = np.linspace(0.0, 1.0, samples, dtype=np.float32)[:, None]
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    centre = (size - 1) / 2 + rng.uniform(-0.02, 0.02) * size
    if name == "linear":
        half = rng.uniform(0.34, 0.48) * size
        depth = rng.uniform(0.78, 0.98) * size
        top = rng.uniform(0.0, 0.98 - depth / size) * size
        lean = rng.uniform(0.0, 0.16) * half if rng.random() < 0.4 else 0.0  # a trapezoid field of view
        plane_x = centre + u * (half - lean + lean * v)
        plane_y = np.broadcast_to(top + v * depth, plane_x.shape)
        row = (ys - top) / depth
        across = (xs - centre) / (half - lean + lean * np.clip(row, 0, 1))
        half_box = half
        y0, y1 = top, top + depth
    else:
        angle = np.deg2rad(rng.uniform(26, 38) if name == "curved" else rng.uniform(32, 43))
        ratio = rng.uniform(0.22, 0.5) if name == "curved" else rng.uniform(0.01, 0.05)
        fit = rng.uniform(0.9, 0.99)
        outer = fit * size / max(2 * np.sin(angle), 1 - ratio * np.cos(angle))
        inner = ratio * outer
        depth = outer - inner
        height = outer - inner * np.cos(angle)
        y0 = rng.uniform(0.0, 1.0) * max(0.0, 0.99 * size - height)
        apex = y0 - inner * np.cos(angle)
        radius = inner + v * depth
        plane_x = centre + radius * np.sin(u * angle)
        plane_y = apex + radius * np.cos(u * angle)
        across = np.arctan2(xs - centre, ys - apex) / angle
        row = (np.hypot(xs - centre, ys - apex) - inner) / depth
        half_box = min(outer * np.sin(angle), 0.5 * size)
        y1 = y0 + height
    inside = (np.abs(across) <= 1) & (row >= 0) & (row <= 1)
    return Geometry(
        name=name,
        size=size,
        depth_px=float(depth),
        box=(float(centre - half_box), float(y0), float(centre + half_box), float(y1)),
        plane_x=np.ascontiguousarray(plane_x, dtype=np.float32),
        plane_y=np.ascontiguousarray(plane_y, dtype=np.float32),
        beam_x=np.where(inside, (across + 1) / 2 * (beams - 1), -9).astype(np.float32),
        beam_y=np.where(inside, row * (samples - 1), -9).astype(np.float32),
        field=inside.astype(np.uint8),
    )
