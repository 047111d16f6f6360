"""One picture of a feed, with where and when it was taken."""

import msgspec
import numpy as np
import numpy.typing as npt


class Frame(msgspec.Struct, frozen=True):
    """One picture of a feed.

    `image` is RGB, contiguous; `captured_ns` is `time.monotonic_ns()` at capture; `sequence` counts the frames of the
    feed from 0; `sector` is the ultrasound region (x0, y0, x1, y1; x1 and y1 outside it) when the feed knows it.
    """

    image: npt.NDArray[np.uint8]  # [height, width, 3]
    sequence: int
    captured_ns: int
    spacing_mm: float | None
    source: str
    sector: tuple[int, int, int, int] | None = None
    flipped: bool | None = None  # left for right, where the feed knows; None: it does not
    still: bool = False  # given for itself, a picture or one of a folder: that it does not change is no freeze
