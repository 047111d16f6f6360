"""Random weights for checkpoints of any size, as fast as a disk can take them and the same bytes for the same seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from sonoedge.export.models.loading import EMBEDDING_STD
from sonoedge.export.safetensors_writer import TensorSpec

BIAS_STD = 0.02
POOL_VALUES = 16_777_213  # a prime, so that no two rows of a matrix begin at the same place of the pool
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class RandomWeights:
    """The bytes of every tensor, cut out of one seeded pool of normal values that is read in a circle.

    Drawing the values of a full-size model takes minutes of computing; cutting them takes none. Each tensor begins at a
    place of its own, which its name and the seed give, so experts differ, and so do all rows of a matrix. The price is
    that values come again, shifted, every `POOL_VALUES`: good for benches, no start for training.
    Scales are those of `init_model` (1 / √fan-in, embeddings 0.02, norms one), except that biases are small, not zero.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._normal = torch.from_numpy(np.random.default_rng(seed).standard_normal(POOL_VALUES, dtype=np.float32))
        # By scale and type; a model has as many as its matrices have widths.
        self._pools: dict[tuple[float, str], npt.NDArray[np.uint8]] = {}

    def pieces(self, tensor: TensorSpec) -> Iterator[memoryview]:
        """The bytes of `tensor` in pieces of at most one pool."""
        if len(tensor.shape) == 1 and tensor.name.endswith("weight"):
            yield torch.ones(tensor.shape, dtype=DTYPES[tensor.dtype]).view(torch.uint8).numpy().data
            return
        pool = self._pool(_std(tensor), tensor.dtype)
        width = DTYPES[tensor.dtype].itemsize
        place = hashlib.sha256(f"{self._seed}:{tensor.name}".encode()).digest()[:8]
        begin, rest = int.from_bytes(place, "little") % POOL_VALUES, tensor.values
        while rest:
            end = min(begin + rest, POOL_VALUES)
            yield pool[begin * width : end * width].data
            rest -= end - begin
            begin = 0

    def _pool(self, std: float, dtype: str) -> npt.NDArray[np.uint8]:
        if (std, dtype) not in self._pools:
            self._pools[std, dtype] = (self._normal * std).to(DTYPES[dtype]).view(torch.uint8).numpy()
        return self._pools[std, dtype]


def _std(tensor: TensorSpec) -> float:
    if len(tensor.shape) == 1:
        return BIAS_STD
    if tensor.name.endswith("embed_tokens.weight"):
        return EMBEDDING_STD
    return 1 / math.sqrt(math.prod(tensor.shape[1:]))
