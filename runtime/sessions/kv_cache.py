"""The KV cache of TensorRT engines on the GPU: written in place by the engine, or copied from what it grew."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sonoedge.bundle import DecoderSpec
from sonoedge.engine_manifest import Bucket
from sonoedge.runtime.sessions.device import Device


class KvCache:
    """Keys and values of every layer, [1, kv_heads, tokens, head_dim] each.

    In place, one buffer is a layer's past and present: the engine writes new rows behind the cached ones, padding too.
    Else the engine takes a past of the whole context, its tail masked, and gives out a present with the new rows behind
    all of it; `take_up` copies these into the past.
    """

    def __init__(
        self,
        device: Device,
        spec: DecoderSpec,
        tokens: int,
        buckets: Sequence[Bucket],
        dtype: npt.DTypeLike,
        *,
        in_place: bool,
    ) -> None:
        """Allocate it, all zero: what is masked must still be a number. `tokens` is the size of the engines' past."""
        self._device, self._heads, self._in_place = device, spec.kv_heads, in_place
        rows = max(bucket.rows for bucket in buckets)
        self.tokens = tokens
        self.shape = (1, spec.kv_heads, self.tokens, spec.head_dim)
        self._row_bytes = spec.head_dim * np.dtype(dtype).itemsize
        names = [f"{part}_{layer}" for layer in range(spec.layers) for part in ("key", "value")]
        self._past = {name: device.allocate(self._heads * self.tokens * self._row_bytes) for name in names}
        self._present = self._past
        if not in_place:
            size = self._heads * (self.tokens + rows) * self._row_bytes
            self._present = {name: device.allocate(size) for name in names}

    def bound(self) -> dict[str, int]:
        """Addresses of the tensors that are the cache's, for every engine of a decoder."""
        sides = {"past": self._past, "present": self._present}
        return {f"{side}_{name}": at for side, buffers in sides.items() for name, at in buffers.items()}

    def has_room(self, bucket: Bucket, length: int) -> bool:
        """Whether a run in `bucket` behind `length` cached tokens stays inside the cache, its padding too."""
        return not self._in_place or length + bucket.rows <= self.tokens

    def columns(self, length: int, new: int) -> npt.NDArray[np.int64]:
        """Where attention finds `length` cached tokens and the `new` ones [length + new]."""
        first = length if self._in_place else self.tokens
        return np.concatenate([np.arange(length), first + np.arange(new)])

    def take_up(self, bucket: Bucket, length: int, new: int) -> None:
        """Keep the first `new` rows of a run in `bucket` behind `length` cached tokens."""
        if self._in_place:
            return
        pitch = self.tokens * self._row_bytes
        for name, past in self._past.items():
            self._device.copy_rows(
                past + length * self._row_bytes,
                pitch,
                self._present[name] + pitch,
                pitch + bucket.rows * self._row_bytes,
                new * self._row_bytes,
                self._heads,
            )


def cache_bytes(spec: DecoderSpec, dtype: npt.DTypeLike, *, in_place: bool) -> int:
    """Device memory that a cache takes at least."""
    tokens = spec.context if in_place else 2 * spec.context
    return 2 * spec.layers * spec.kv_heads * tokens * spec.head_dim * np.dtype(dtype).itemsize
