"""What every session refuses alike: too many tokens, pictures without places for them, a rewind to the future."""

import numpy as np
import numpy.typing as npt

from sonoedge.bundle import DecoderSpec
from sonoedge.errors import SonoEdgeError


def check_rewind(held: int, length: int) -> None:
    """Raise SonoEdgeError unless a cache of `held` tokens can be rewound to the first `length` of them."""
    if not 0 <= length <= held:
        raise SonoEdgeError(f"the cache holds {held} tokens and cannot be rewound to {length}: rewind to fewer")


def check_extend(
    spec: DecoderSpec, held: int, ids: npt.NDArray[np.int64], image_embeds: npt.NDArray[np.float32] | None
) -> None:
    """Raise SonoEdgeError unless `ids` [n] fit behind `held` tokens, with a row of embeddings for each image token."""
    total = held + len(ids)
    if total > spec.context:
        raise SonoEdgeError(
            f"{total} tokens do not fit the context of {spec.context}: ask a shorter question, or build the "
            "bundle with a larger context"
        )
    images = 0 if image_embeds is None else len(image_embeds)
    places = int((ids == spec.image_token_id).sum())
    if images and images != places:  # the graph would read past the end
        raise SonoEdgeError(
            f"the text holds {places} image tokens but the images give {images}: write one image token for each"
        )


def check_rows(logits_rows: npt.NDArray[np.int64], new: int) -> None:
    """Raise SonoEdgeError unless logits are asked for rows of the call's own `new` tokens."""
    if ((logits_rows < 0) | (logits_rows >= new)).any():
        raise SonoEdgeError(
            f"logits are asked for rows {logits_rows.tolist()} of {new} tokens: this is a defect, report it"
        )
