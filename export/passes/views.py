"""Names of initializers that see bytes of the weights file in another way than the layout does."""

from __future__ import annotations

import re

import msgspec

from sonoedge.export.layout import Stored

BITS = "_bits"  # int8 as uint8
WORDS = "_words"  # four int8 as an int32
WORD_BYTES = 4
_PART = re.compile(r"_part(\d+)of(\d+)$")


class View(msgspec.Struct, frozen=True):
    """Where an initializer's bytes are in the weights file, and its shape."""

    offset: int
    length: int
    shape: tuple[int, ...]


def part_name(name: str, index: int, parts: int) -> str:
    """Name of an equal share of the rows of `name`."""
    return f"{name}_part{index}of{parts}"


def stored_name(name: str) -> str:
    """What the layout calls the tensor that an initializer sees."""
    return _PART.sub("", name.removesuffix(BITS).removesuffix(WORDS))


def view(name: str, stored: Stored) -> View:
    """What the initializer `name` sees of `stored`."""
    shape = stored.shape
    if name.endswith(WORDS):
        return View(stored.offset, stored.length, (*shape[:-1], shape[-1] // WORD_BYTES))
    if part := _PART.search(name):
        index, parts = int(part[1]), int(part[2])
        length = stored.length // parts
        return View(stored.offset + index * length, length, (shape[0] // parts, *shape[1:]))
    return View(stored.offset, stored.length, shape)
