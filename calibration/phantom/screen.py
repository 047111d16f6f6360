"""A device's screen around a moving phantom: names, scales, logo, menus, clock and ECG; the exact sector is known."""

from collections.abc import Callable

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom.clip import clip_of, clip_scene

Grey = npt.NDArray[np.uint8]

SIZES = ((640, 480), (800, 600), (1024, 768), (1280, 720), (480, 640), (960, 720), (720, 960), (1920, 1080))
_NAMES = "NGUYEN LINH|MUELLER HANS|1970-01-01|12:41:09|ID 448812|OKAFOR ADA|F 52 y|24.11.1988"
_SETTINGS = "MI 1.1|TIS 0.4|Gn 60|DR 55|12.4 cm|Thyroid|General|L12-4|C5-1|Freeze|2D|Res|28Hz|HGen|Map 3|Persist 2|THI"
WORDS = tuple(f"{_NAMES}|{_SETTINGS}".split("|"))
CLEARANCE = 0.006  # of the longer side: what is written keeps this distance from the sector
SMALLEST, LARGEST = 0.5, 0.88  # side of the phantom, of the screen's shorter side

Draw = Callable[[Grey, np.random.Generator], None]


class Screen(msgspec.Struct, frozen=True, eq=False):
    """The pictures of one screen, and what is sector and what is not."""

    images: tuple[Grey, ...]  # [height, width, 3] RGB each
    sector: npt.NDArray[np.bool_]  # [height, width]
    writing: npt.NDArray[np.bool_]  # [height, width] everything drawn beside it, in any picture
    geometry: str
    quality: str


def screen(seed: int, frames: int, *, quality: str | None = None, jpeg: bool | None = None) -> Screen:
    """Make the screen number `seed`; `jpeg` says whether its pictures were compressed, drawn when None.

    Raises SonoEdgeError as `phantom_clip` does.
    """
    rng = np.random.Generator(np.random.SFC64([77, seed]))
    width, height = SIZES[int(rng.integers(len(SIZES)))]
    side = int(min(width, height) * rng.uniform(SMALLEST, LARGEST))
    x, y = (int(rng.integers(0, free - side + 1)) for free in (width, height))
    made = clip_scene(seed, quality=quality)
    field = np.zeros((height, width), np.uint8)
    field[y : y + side, x : x + side] = cv2.resize(made.geometry.field, (side, side), interpolation=cv2.INTER_NEAREST)
    near = _near(field) > 0
    still = _overlay(rng, field, near)
    ground = int(rng.integers(6, 45)) if rng.random() < 0.25 else 0
    compressed = bool(rng.random() < 0.5) if jpeg is None else jpeg
    amplitude, writing, images = rng.uniform(0.01, 0.04) * height, _lit(still), []
    parts = (_clock(rng, field), _trace(rng, field, amplitude) if rng.random() < 0.3 else None)
    for index, phantom in enumerate(clip_of(made, frames, 15.0)):
        moving = np.zeros_like(still)
        for part in parts:
            if part is not None:
                part(moving, index)
        moving[near] = 0
        writing |= _lit(moving)
        image = np.maximum(np.maximum(still, moving), np.uint8(ground))
        tissue = np.zeros_like(still)
        tissue[y : y + side, x : x + side] = cv2.resize(phantom.image, (side, side), interpolation=cv2.INTER_LINEAR)
        image[field > 0] = tissue[field > 0]
        images.append(_compressed(image) if compressed else image)
    return Screen(tuple(images), field > 0, writing, made.geometry.name, made.quality)


def _near(field: Grey) -> Grey:
    reach = 2 * round(CLEARANCE * max(field.shape)) + 1
    return np.asarray(cv2.dilate(field, np.ones((reach, reach), np.uint8)), np.uint8)


def _lit(layer: Grey) -> npt.NDArray[np.bool_]:
    red, green, blue = cv2.split(layer)
    return np.asarray(cv2.max(cv2.max(red, green), blue) > 0)


def _overlay(rng: np.random.Generator, field: Grey, near: npt.NDArray[np.bool_]) -> Grey:
    """Everything that stands still beside the sector. [height, width, 3]"""
    layer = np.zeros((*field.shape, 3), np.uint8)
    steps: list[tuple[float, Draw]] = [(0.3, _panel), (0.3, _panel), (0.6, _grey_bar), (0.5, _logo), (0.7, _marker)]
    for chance, draw in steps:
        if rng.random() < chance:
            _place(layer, near, draw, rng)
    for _ in range(int(rng.integers(5, 18))):
        _place(layer, near, _line, rng)
    if rng.random() < 0.8:
        _ruler(layer, near, field, rng)
    return layer


def _place(layer: Grey, near: npt.NDArray[np.bool_], draw: Draw, rng: np.random.Generator) -> None:
    """Draw one thing unless it would touch the sector."""
    drawn = np.zeros_like(layer)
    draw(drawn, rng)
    lit = _lit(drawn)
    if not (near & lit).any():
        layer[lit] = drawn[lit]


def _ink(rng: np.random.Generator, low: int = 110) -> tuple[int, int, int]:
    if rng.random() < 0.6:
        grey = int(rng.integers(low, 256))
        return grey, grey, grey
    red, green, blue = (int(value) for value in rng.integers(low, 256, 3))
    return red, green, blue


def _line(layer: Grey, rng: np.random.Generator) -> None:
    """One to three lines of text."""
    height, width = layer.shape[:2]
    scale = rng.uniform(0.35, 1.0) * height / 600
    thickness, font = int(rng.integers(1, 3)), int(rng.integers(0, 8))
    x, y, ink = int(rng.integers(0, width - 60)), int(rng.integers(12, height - 4)), _ink(rng)
    for _ in range(int(rng.integers(1, 4))):
        cv2.putText(layer, WORDS[int(rng.integers(len(WORDS)))], (x, y), font, scale, ink, thickness, cv2.LINE_AA)
        y += round(32 * scale)


def _panel(layer: Grey, rng: np.random.Generator) -> None:
    """A menu bar along one edge, with words on it."""
    height, width = layer.shape[:2]
    deep = rng.uniform(0.04, 0.12)
    x0, y0, x1, y1 = ((0, 0, 1, deep), (0, 1 - deep, 1, 1), (0, 0, deep, 1), (1 - deep, 0, 1, 1))[int(rng.integers(4))]
    corner, opposite = (round(x0 * width), round(y0 * height)), (round(x1 * width), round(y1 * height))
    cv2.rectangle(layer, corner, opposite, [int(value) for value in rng.integers(10, 110, 3)], -1)
    for _ in range(5):
        at = (int(rng.uniform(x0, x1) * width), int(rng.uniform(y0, y1) * height))
        cv2.putText(layer, WORDS[int(rng.integers(len(WORDS)))], at, 0, 0.5 * height / 600, _ink(rng), 1, cv2.LINE_AA)
    layer[: corner[1]] = 0
    layer[opposite[1] :] = 0
    layer[:, : corner[0]] = 0
    layer[:, opposite[0] :] = 0


def _grey_bar(layer: Grey, rng: np.random.Generator) -> None:
    height, width = layer.shape[:2]
    tall, wide = int(height * rng.uniform(0.15, 0.4)), max(6, int(width * rng.uniform(0.01, 0.025)))
    x, y = int(rng.integers(0, width - wide)), int(rng.integers(0, height - tall))
    ramp = np.linspace(255, 1, tall).astype(np.uint8)
    layer[y : y + tall, x : x + wide] = ramp[:, None, None]


def _logo(layer: Grey, rng: np.random.Generator) -> None:
    height, width = layer.shape[:2]
    radius = int(height * rng.uniform(0.015, 0.04))
    centre = (int(rng.integers(radius, width - radius)), int(rng.integers(radius, height - radius)))
    cv2.circle(layer, centre, radius, _ink(rng, 60), -1, cv2.LINE_AA)
    cv2.putText(layer, "Sono", (centre[0] + radius, centre[1]), 2, height / 500, _ink(rng), 2, cv2.LINE_AA)


def _marker(layer: Grey, rng: np.random.Generator) -> None:
    height, width = layer.shape[:2]
    centre = (int(rng.integers(10, width - 10)), int(rng.integers(10, height // 3)))
    cv2.circle(layer, centre, max(3, height // 90), (40, 130, 250), -1, cv2.LINE_AA)


def _ruler(layer: Grey, near: npt.NDArray[np.bool_], field: Grey, rng: np.random.Generator) -> None:
    """Depth ticks close by the sector's widest place, never on it."""
    rows, columns = np.flatnonzero(field.any(axis=1)), np.flatnonzero(field.any(axis=0))
    away = int(rng.uniform(0.008, 0.05) * field.shape[1])
    x = int(columns[-1]) + away if rng.random() < 0.7 else int(columns[0]) - away
    drawn, ink, ticks = np.zeros_like(layer), _ink(rng), int(rng.integers(5, 30))
    for index, y in enumerate(np.linspace(rows[0], rows[-1], ticks)):
        long = max(2, field.shape[1] // (90 if index % 5 else 50))
        cv2.line(drawn, (x, round(y)), (x + long if x > columns[0] else x - long, round(y)), ink, 1)
    drawn[near] = 0
    lit = _lit(drawn)
    layer[lit] = drawn[lit]


def _clock(rng: np.random.Generator, field: Grey) -> Callable[[Grey, int], None]:
    height, width = field.shape
    at, ink = (int(rng.integers(0, width // 2)), int(rng.integers(12, height - 4))), _ink(rng)

    def draw(layer: Grey, index: int) -> None:
        cv2.putText(layer, f"10:15:{index:02d}", at, 0, 0.5 * height / 600, ink, 1, cv2.LINE_AA)

    return draw


def _trace(rng: np.random.Generator, field: Grey, amplitude: float) -> Callable[[Grey, int], None]:
    """An ECG that runs along the bottom."""
    height, width = field.shape
    base, ink = height - 1.5 * amplitude, _ink(rng)
    x = np.arange(0, width, 2)

    def draw(layer: Grey, index: int) -> None:
        beat = np.exp(-np.square(((x / width * 6 + index * 0.07) % 1 - 0.5) * 25)) * amplitude
        points = np.stack([x, base - beat], axis=1).astype(np.int32)
        cv2.polylines(layer, [points], False, ink, 1, cv2.LINE_AA)

    return draw


def _compressed(image: Grey) -> Grey:
    coded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1]
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
