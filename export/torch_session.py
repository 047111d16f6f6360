"""The torch model behind the runtime's session interface: teacher, student and bundle are measured by one code."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.attention import visible_bias
from sonoedge.export.models.cache import KVCache
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.runtime.preprocess import ImageSpec, Patches
from sonoedge.runtime.sessions.base import DecoderSpec


def decoder_spec(config: ModelConfig, context: int) -> DecoderSpec:
    """The decoder's sizes as the runtime names them; `context` is the capacity of the KV cache in tokens."""
    return DecoderSpec(
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        context=context,
        image_token_id=config.image_token_id,
        eos_token_ids=config.eos_token_ids,
    )


class TorchSession:
    """A `Session` on the torch model, in its own dtype."""

    def __init__(self, model: EchoVLM, image: ImageSpec, context: int) -> None:
        self.model, self.image = model.eval(), image
        self.spec = decoder_spec(model.config, context)
        self._cache = KVCache(model.config.num_hidden_layers)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._cache.length

    @torch.no_grad()
    def encode_image(self, patches: Patches) -> npt.NDArray[np.float32]:
        """Return the embeddings [merged, hidden] of one picture."""
        return self.model.encode_images(torch.from_numpy(patches.values), [patches.grid]).float().numpy()

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`."""
        if not 0 <= length <= self.length:
            raise SonoEdgeError(
                f"the cache holds {self.length} tokens and cannot be rewound to {length}: rewind to fewer"
            )
        if length == 0:
            self._cache = KVCache(self.model.config.num_hidden_layers)
        else:
            self._cache.rewind(length)

    @torch.no_grad()
    def extend(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        *,
        image_embeds: npt.NDArray[np.float32] | None = None,
        visible: npt.NDArray[np.bool_] | None = None,
        logits_rows: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Append tokens to the cache and return logits [r, vocab]; see `Session.extend`."""
        if self.length + len(ids) > self.spec.context:
            raise SonoEdgeError(
                f"{self.length + len(ids)} tokens do not fit the context of {self.spec.context}: ask a shorter question"
            )
        rows = np.array([len(ids) - 1]) if logits_rows is None else logits_rows
        images = None if image_embeds is None or not len(image_embeds) else torch.tensor(image_embeds)
        bias = None if visible is None else visible_bias(torch.tensor(visible)[None, None], torch.float32)
        output = self.model(
            torch.tensor(ids)[None],
            torch.tensor(positions)[:, None],
            image_embeds=images,
            attention_bias=bias,
            cache=self._cache,
            logits_rows=torch.tensor(rows),
        )
        logits: npt.NDArray[np.float32] = output.logits[0].float().numpy()
        return logits

    def close(self) -> None:
        """Forget the cache."""
        self.rewind(0)
