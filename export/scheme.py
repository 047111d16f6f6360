"""How one product is computed, and the plan that gives every product its scheme: symmetric int8, zero point 0.

Source: the rules for explicit quantization that TensorRT holds to (per-channel scales on constant weights, per-tensor
scales on activations), https://docs.nvidia.com/deeplearning/tensorrt.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError

INT8_MAX = 127
BLOCK = 128  # inputs of a row that share a scale in `W8A16_BLOCK`
SMALLEST = float(np.finfo(np.float32).tiny)


class Scheme(Enum):
    """How one product is computed, from the narrowest to the widest."""

    W8A8 = "w8a8"  # int8 weights per output channel, int8 activations with one fixed scale
    W8A8_DYNAMIC = "w8a8-dynamic"  # the same weights, int8 activations with a scale for each token
    W8A16 = "w8a16"  # the same weights, activations as they are
    W8A16_BLOCK = "w8a16-block128"  # int8 weights with a scale for each 128 inputs, activations as they are
    FLOAT = "float"

    @property
    def per_channel(self) -> bool:
        """Whether the weights are int8 with one scale an output channel."""
        return self in (Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W8A16)

    @property
    def block(self) -> int | None:
        """Inputs that share a scale, None where a whole row does (or the weights are float)."""
        return BLOCK if self is Scheme.W8A16_BLOCK else None


WIDER = tuple(Scheme)


class CacheScheme(Enum):
    """How the KV cache is stored."""

    FLOAT = "float"
    INT8 = "int8"  # one fixed scale for the keys and one for the values of a layer


class QuantizationPlan(msgspec.Struct, frozen=True):
    """The scheme of every named product, and the largest input that calibration allows there."""

    schemes: Mapping[str, Scheme]
    input_maximum: Mapping[str, float]
    cache: CacheScheme = CacheScheme.FLOAT
    cache_maximum: Mapping[str, float] = {}

    def activation_scale(self, name: str) -> float:
        """Scale of the int8 input of product `name`; raises SonoEdgeError when calibration never saw it."""
        return _scale(name, self.input_maximum)

    def cache_scale(self, name: str) -> float:
        """Scale of the int8 cache `name`, "model.layers.0.self_attn.key" or ".value"; raises as `activation_scale`."""
        return _scale(name, self.cache_maximum)


def _scale(name: str, maximum: Mapping[str, float]) -> float:
    largest = maximum.get(name)
    if largest is None or not largest > 0:
        raise SonoEdgeError(
            f"calibration has no range for {name!r}: calibrate on more frames, or keep it float in the recipe"
        )
    return largest / INT8_MAX


def quantize_weight(
    weight: npt.NDArray[np.float32], block: int | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8 per row, or per `block` inputs of a row (the last block of a row may be short).

    weight [out, in] to int8 [out, in] and scales float32 [out], or [out, ceil(in / block)].
    Raises SonoEdgeError when a weight is not finite.
    """
    columns = weight.shape[1]
    if block is None:
        largest = np.maximum(weight.max(axis=1), -weight.min(axis=1))[:, None]  # [out, 1]
    else:
        largest = np.maximum.reduceat(np.abs(weight), np.arange(0, columns, block), axis=1)  # [out, blocks]
    if not np.isfinite(largest).all():
        raise SonoEdgeError("a weight is not finite: check the checkpoint, it cannot be quantized")
    # Rows of zeros take any scale; the smallest normal number keeps the scale of tiny rows from vanishing.
    scale = np.where(largest > 0, np.maximum(largest / INT8_MAX, SMALLEST), 1.0).astype(np.float32)
    steps = weight / (scale if block is None else np.repeat(scale, block, axis=1)[:, :columns])
    np.clip(np.rint(steps, out=steps), -INT8_MAX, INT8_MAX, out=steps)
    return steps.astype(np.int8), scale[:, 0] if block is None else scale
