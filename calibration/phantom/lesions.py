"""Lesions: the outline of each kind, a place for it inside the organ, and how it is drawn."""

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import noise
from sonoedge.calibration.phantom.canvas import Canvas, Points, fixed, lowered, polygon_mask

MIN_RADIUS = 14.2  # pixels at 224: a smaller lesion is lost at the model's input size
MAX_RADIUS = 40.0
SIDE_MARGIN = 0.085  # of the size, between a lesion's centre and the middle of the image


class Placed(msgspec.Struct, frozen=True, eq=False):
    """A lesion that has found its place."""

    kind: str
    outline: Points
    mask: npt.NDArray[np.uint8]  # [size, size]
    x: float
    y: float
    half_width: float
    half_height: float


def outline(kind: str, rng: np.random.Generator) -> Points:
    """The closed shape of a kind around the origin, with the area of the unit circle. [64, 2]"""
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    phase = rng.uniform(0, 2 * np.pi, 4)
    if kind == "cyst":
        aspect, angle = rng.uniform(0.95, 1.25), rng.uniform(-0.3, 0.3)
        r = 1 + 0.015 * np.sin(3 * t + phase[0])
    elif kind == "oval_solid":
        aspect, angle = rng.uniform(1.5, 1.9), rng.uniform(-0.2, 0.2)
        r = 1 + 0.02 * np.sin(3 * t + phase[0])
    elif kind == "irregular_solid":
        aspect, angle = rng.uniform(0.6, 0.74), rng.uniform(-0.2, 0.2)
        spikes = rng.integers(7, 11)
        r = 1 + 0.12 * np.sin(3 * t + phase[0]) + 0.07 * np.sin(5 * t + phase[1])
        r = r + 0.2 * np.maximum(0, np.sin(spikes * t + phase[2])) ** 2 * (0.7 + 0.3 * np.sin(2 * t + phase[3]))
    else:
        aspect, angle = rng.uniform(1.2, 1.6), rng.uniform(-0.15, 0.15)
        r = 1 + 0.05 * np.sin(3 * t + phase[0]) + 0.04 * np.sin(5 * t + phase[1])
    x, y = np.sqrt(aspect) * r * np.cos(t), r * np.sin(t) / np.sqrt(aspect)
    c, s = np.cos(angle), np.sin(angle)
    x, y = c * x - s * y, s * x + c * y
    area = 0.5 * abs(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    return np.asarray(np.stack([x, y], axis=1) * np.sqrt(np.pi / area))


def radius(kind: str, rng: np.random.Generator) -> float:
    """A radius in pixels at 224: almost half are small, the rest reach to the largest of the kind."""
    if rng.random() < 0.46:
        return float(rng.uniform(MIN_RADIUS, 17.5))
    largest = 28.0 if kind == "calcification" else MAX_RADIUS
    return float(18.0 + (largest - 18.0) * rng.random() ** 1.4)


def place(canvas: Canvas, kind: str, rng: np.random.Generator, margin: float) -> Placed | None:
    """Find a place inside the organ and the field of view, or None where the organ is too small.

    `margin` is the least distance from the middle of the image, a fraction of the size.
    """
    size, scale = canvas.size, canvas.scale
    shape = outline(kind, rng)
    wanted = min(radius(kind, rng), canvas.largest_lesion) * scale
    half = np.abs(shape).max(axis=0) * 1.04  # [2] half extents of the unit lesion
    allowed = canvas.organ & canvas.geometry.field
    # squeezed so that the lesion is round, and halved: the distance transform then measures the fit
    width, height = round(size / (2 * half[0])), round(size / (2 * half[1]))
    small = cv2.resize(allowed, (width, height), interpolation=cv2.INTER_AREA)
    small = cv2.copyMakeBorder(small, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    room = cv2.distanceTransform(small, cv2.DIST_L2, 5)[1:-1, 1:-1] - 1.0
    middle = np.abs(np.arange(width) * (size / width) - (size - 1) / 2)
    room[:, middle < (margin * size + 1)] = 0
    if kind != "oval_solid":  # what lies behind the lesion names its kind, so it has to be in view
        drop = round(0.13 * height) + round(wanted / 2)
        view = cv2.resize(canvas.geometry.field, (width, height), interpolation=cv2.INTER_NEAREST)
        room[: height - drop] *= view[drop:]
        room[height - drop :] = 0
    r = min(wanted, 2 * float(room.max()) - 0.5)
    if r < MIN_RADIUS * scale:
        return None
    candidates = np.flatnonzero(room.ravel() >= r / 2)
    left = candidates % width < width / 2
    both = bool(left.any()) and not bool(left.all())
    if both:
        candidates = candidates[left == (rng.random() < 0.5)]
    picks = candidates[rng.integers(len(candidates), size=8)]
    pick = picks[np.argmin(room.ravel()[picks])] if canvas.cavities else picks[0]
    row, column = divmod(int(pick), width)
    x, y = (column + 0.5) * size / width - 0.5, (row + 0.5) * size / height - 0.5
    points = shape * r + (x, y)
    mask = polygon_mask(points, size)
    if np.any(mask & ~allowed & 1):
        return None
    return Placed(kind, points, mask, x, y, float(half[0] * r), float(half[1] * r))


def draw(canvas: Canvas, lesion: Placed, rng: np.random.Generator) -> None:
    """Draw a placed lesion, in a bed of its organ's own tissue so that it stands out from cavities and vessels."""
    centre = np.array([lesion.x, lesion.y])
    spread = centre + (lesion.outline - centre) * (
        1 + canvas.px(canvas.bed_px) / min(lesion.half_width, lesion.half_height)
    )
    bed_mask = polygon_mask(spread, canvas.size) & canvas.organ
    np.copyto(canvas.echo_db, np.float32(canvas.bed_db), where=bed_mask.astype(bool))
    np.copyto(canvas.attenuation, np.float32(0), where=bed_mask.astype(bool))
    canvas.erase_reflectors(spread)
    inside = lesion.mask.astype(bool)
    height = 2 * lesion.half_height
    if lesion.kind == "cyst":
        canvas.fill(lesion.outline, -48.0, -rng.uniform(8.0, 12.0) / height)
        canvas.reflect(lesion.outline, rng.uniform(2.2, 3.5), closed=True)
    elif lesion.kind == "oval_solid":
        canvas.fill(lesion.outline, canvas.bed_db - rng.uniform(11.0, 15.0))
        canvas.reflect(lesion.outline, rng.uniform(1.6, 2.4), closed=True)
    elif lesion.kind == "irregular_solid":
        drop = rng.uniform(8.0, 11.0) if canvas.cavities else rng.uniform(13.0, 18.0)
        canvas.fill(lesion.outline, canvas.bed_db - drop, rng.uniform(16.0, 24.0) / height)
        lumps = noise.smooth(rng, canvas.size, canvas.size, 18) * np.float32(3.5)
        canvas.echo_db += lumps * inside
    else:
        canvas.fill(lesion.outline, canvas.bed_db + 2.0, 34.0 / height)
        rim = lesion.outline[lesion.outline[:, 1] <= lesion.y - 0.1 * lesion.half_height]
        rim = rim[np.argsort(rim[:, 0])]
        thick = rng.uniform(0.42, 0.6) * 2 * lesion.half_height
        cap = np.concatenate([rim, lowered(rim, thick)[::-1]])
        bright = np.zeros_like(lesion.mask)
        cv2.fillPoly(bright, [fixed(cap)], 1, shift=4)
        np.copyto(
            canvas.echo_db,
            np.float32(canvas.bed_db + rng.uniform(15.0, 19.0)),
            where=(bright & lesion.mask).astype(bool),
        )
        canvas.reflect(rim, 8.0, 2.0)
