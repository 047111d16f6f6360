"""A picture of what the runtime said: frames with their hints, beside the truth where it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

TILE = 224
LINE = 17
COLUMNS = 4
INK = (225, 225, 225)
RIGHT, WRONG, SILENT = (130, 220, 130), (250, 110, 100), (165, 165, 165)


class HintLine(msgspec.Struct, frozen=True):
    """One hint as a line of text: what was said, how sure, and what is true where that is known."""

    name: str
    said: str | None  # None: it abstained
    probability: float
    truth: str | None  # None: not known
    reason: str | None = None

    def text(self) -> str:
        """The line, ASCII only."""
        said = f"{self.said} {self.probability:.0%}" if self.said is not None else f"silent: {self.reason}"
        return f"{self.name}: {said}"

    @property
    def colour(self) -> tuple[int, int, int]:
        """Grey for silence, green or red beside a known truth, else white."""
        if self.said is None:
            return SILENT
        if self.truth is None:
            return INK
        return RIGHT if self.said == self.truth else WRONG


class Tile(msgspec.Struct, frozen=True):
    """One frame uint8 [H, W, 3] RGB with its hints and the truth in words."""

    image: npt.NDArray[np.uint8]
    hints: Sequence[HintLine]
    truth: str


def write_contact_sheet(rows: Mapping[str, Sequence[Tile]], path: Path, title: str) -> None:
    """Write a PNG with one row of tiles a clip, each row under its name; the first four tiles of a row are drawn."""
    lines = max((len(tile.hints) for tiles in rows.values() for tile in tiles), default=0) + 1
    height = TILE + lines * LINE + 10
    strips = [_heading(title, COLUMNS * (TILE + 8), 34, 0.62)]
    for name, tiles in rows.items():
        strips.append(_heading(name, COLUMNS * (TILE + 8), 24, 0.48))
        strip = np.zeros((height, COLUMNS * (TILE + 8), 3), np.uint8)
        for column, tile in enumerate(tiles[:COLUMNS]):
            _draw(strip, tile, column * (TILE + 8) + 4)
        strips.append(strip)
    # Not imwrite, which says nothing when it cannot write.
    _, png = cv2.imencode(".png", cv2.cvtColor(np.vstack(strips), cv2.COLOR_RGB2BGR))
    path.write_bytes(png.tobytes())


def _draw(strip: npt.NDArray[np.uint8], tile: Tile, left: int) -> None:
    height, width = tile.image.shape[:2]
    scale = TILE / max(height, width)
    small = cv2.resize(tile.image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_AREA)
    strip[: small.shape[0], left : left + small.shape[1]] = small
    for index, hint in enumerate(tile.hints):
        _write(strip, hint.text(), (left, TILE + (index + 1) * LINE), hint.colour)
    _write(strip, tile.truth, (left, TILE + (len(tile.hints) + 1) * LINE), (120, 170, 250))


def _heading(text: str, width: int, height: int, size: float) -> npt.NDArray[np.uint8]:
    strip = np.full((height, width, 3), 38, np.uint8)
    cv2.putText(strip, text, (6, height - 9), cv2.FONT_HERSHEY_SIMPLEX, size, INK, 1, cv2.LINE_AA)
    return strip


def _write(picture: npt.NDArray[np.uint8], text: str, place: tuple[int, int], colour: tuple[int, int, int]) -> None:
    cv2.putText(picture, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)
