"""Positions of tokens in time, height and width, as Qwen2-VL's rotary embedding wants them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError


def mrope_positions(
    ids: npt.NDArray[np.int64],
    image_grids: Sequence[tuple[int, int, int]],
    *,
    image_token_id: int,
    merge_size: int,
    start: int = 0,
) -> tuple[npt.NDArray[np.int64], int]:
    """Return the positions [3, n] of the tokens `ids` [n] and the position that follows them.

    `image_grids` are the (t, h, w) patch grids of the images, in order; text counts on from the largest position of the
    image before it. Raises SonoEdgeError when the image tokens do not fit the grids. Source: Qwen2-VL's get_rope_index.
    """
    is_image = ids == image_token_id  # [n]
    expected = sum(t * (h // merge_size) * (w // merge_size) for t, h, w in image_grids)
    if int(is_image.sum()) != expected:
        raise SonoEdgeError(
            f"the prompt holds {int(is_image.sum())} image tokens and its {len(image_grids)} images need {expected}: "
            "build it with prompt.prefix_ids"
        )
    positions = np.empty((3, len(ids)), np.int64)
    cursor, position = 0, start
    for t, h, w in image_grids:
        rows, columns = h // merge_size, w // merge_size
        first = cursor + int(np.argmax(is_image[cursor:]))
        last = first + t * rows * columns
        if not is_image[first:last].all():
            raise SonoEdgeError(f"image tokens {first} to {last - 1} are interrupted: one image is one unbroken block")
        positions[:, cursor:first] = np.arange(position, position + first - cursor)
        position += first - cursor
        positions[:, first:last] = np.indices((t, rows, columns)).reshape(3, -1) + position
        position += max(t, rows, columns)
        cursor = last
    positions[:, cursor:] = np.arange(position, position + len(ids) - cursor)
    return positions, position + len(ids) - cursor
