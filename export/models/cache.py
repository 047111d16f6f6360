"""The keys and values of past tokens, a layer at a time: the plain form that reference generation uses."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values [B, kv_heads, T, D] of every layer, grown by concatenation."""

    def __init__(self, layers: int) -> None:
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    @property
    def length(self) -> int:
        """Tokens held, counted in the last layer, so it changes only when a whole pass is done."""
        last = self._layers[-1]
        return 0 if last is None else last[0].shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v [B, kv_heads, S, D] of new tokens and return all that the layer holds."""
        held = self._layers[layer]
        grown = (k, v) if held is None else (torch.cat((held[0], k), dim=2), torch.cat((held[1], v), dim=2))
        self._layers[layer] = grown
        return grown

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`."""
        self._layers = [held and (held[0][:, :, :length], held[1][:, :, :length]) for held in self._layers]
