"""What every backend offers: an image encoder, and a decoder whose KV cache can be extended and rewound."""

from typing import Protocol

import numpy as np
import numpy.typing as npt

from sonoedge.bundle import DecoderSpec, ImageSpec
from sonoedge.runtime.preprocess import Patches

__all__ = ["DecoderSpec", "Session"]


class Session(Protocol):
    """One model loaded for one conversation at a time; not safe to share between threads."""

    spec: DecoderSpec
    image: ImageSpec

    @property
    def length(self) -> int:
        """Tokens in the KV cache."""
        ...

    def encode_image(self, patches: Patches) -> npt.NDArray[np.float32]:
        """Return the embeddings [merged, hidden] of one picture, in memory of their own: callers keep them."""
        ...

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`."""
        ...

    def extend(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        *,
        image_embeds: npt.NDArray[np.float32] | None = None,
        visible: npt.NDArray[np.bool_] | None = None,
        logits_rows: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Append the tokens `ids` [n] at `positions` [3, n] to the cache and return logits [r, vocab].

        `image_embeds` [m, hidden] replace the image tokens in order; `visible` [n, length + n] says which tokens each
        new token attends (None: all before it and itself); `logits_rows` [r] are rows of this call (None: the last).
        Raises SonoEdgeError when the tokens do not fit the context.
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...
