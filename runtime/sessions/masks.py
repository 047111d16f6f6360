"""Which tokens see which, and the attention bias that graphs add to their scores for it."""

from typing import Any

import numpy as np
import numpy.typing as npt

# What a token must not see gets this: far under every score, and so near to zero that a 16-bit sum stays finite.
HIDDEN: dict[str, float] = {"float32": -1e9, "float16": -3e4}


def causal(new: int, held: int) -> npt.NDArray[np.bool_]:
    """Return [new, held + new]: every new token sees itself and all tokens before it."""
    return np.tri(new, held + new, held, dtype=np.bool_)


def attention_bias(
    visible: npt.NDArray[np.bool_],
    columns: npt.NDArray[np.int64],
    shape: tuple[int, int],
    dtype: npt.DTypeLike = np.float32,
) -> npt.NDArray[Any]:
    """Return the bias [1, 1, rows, width] for `shape` (rows, width): 0 where a token sees, `HIDDEN` elsewhere.

    visible [n, tokens] says which tokens each new one sees, columns [tokens] where the keys of those tokens are. Rows
    beyond the n see what the last one sees: attention to nothing would give no number.
    """
    bias = np.full(shape, HIDDEN[np.dtype(dtype).name], dtype)
    bias[: len(visible), columns] = np.where(visible, 0, bias[0, 0])
    bias[len(visible) :] = bias[len(visible) - 1]
    return bias[None, None]
