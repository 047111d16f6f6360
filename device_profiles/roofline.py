"""What one run of a stage reads and computes, and the time that a device's limits allow it.

Source: Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", CACM 52 (2009). Weights and
the KV cache are all that is counted of memory: activations are small beside them, and may stay in caches.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sonoedge.device_profiles.schema import Mode
from sonoedge.device_profiles.shape import (
    ModelShape,
    Weights,
    block_matrices,
    expert_matrices,
    layer_matrices,
    merger_matrices,
    values,
)

NEGLIGIBLE = 0.1  # of the other limit: even a tenth of the rate would not be felt
UNPUBLISHED = "nobody has published what share of the"


class Work(msgspec.Struct, frozen=True):
    """One run of a stage; operations are multiplications and additions, of int8 products and of the rest in 16 bit."""

    bytes: int
    int8_operations: int
    float_operations: int

    @property
    def operations(self) -> int:
        """All of them."""
        return self.int8_operations + self.float_operations


class StageTime(msgspec.Struct, frozen=True):
    """What a stage takes: no run is faster than `at_least_ms`; `expected_ms` is at the pace that others have reached.

    None where a number is unknown, `unknown` then says which.
    """

    work: Work
    at_least_ms: float | None
    expected_ms: float | None
    bound_by: Literal["memory", "arithmetic"] | None
    unknown: str | None


def vision_work(shape: ModelShape, weights: Weights, patches: int, *, int8: bool) -> Work:
    """One image of `patches`; int8: whether products take int8 activations."""
    vision = shape.vision
    if vision is None:
        return Work(0, 0, 0)
    tower = vision.width * vision.patch_values + vision.layers * values(block_matrices(vision))
    merged = -(-patches // vision.merge**2)
    products = 2 * (patches * tower + merged * values(merger_matrices(shape)))
    attention = 4 * patches**2 * vision.width * vision.layers
    return _work(weights.vision, products, attention, int8=int8)


def decoder_work(
    shape: ModelShape, weights: Weights, *, rows: int, seen: int, logits_rows: int, cache_bits: int, int8: bool
) -> Work:
    """One pass of `rows` new tokens that attend to `seen` tokens, themselves included.

    Reads the experts that some token chose: as many as one token chooses for one, soon all of them for many.
    """
    read, expert_products = 0, 0
    if shape.experts is not None:
        touched = min(shape.experts.count, rows * shape.experts.chosen)
        read = weights.experts * touched // shape.experts.count
        one_expert = values(expert_matrices(shape)) // shape.experts.count
        expert_products = shape.experts.chosen * one_expert
    products = 2 * rows * shape.layers * (values(layer_matrices(shape)) + expert_products)
    products += 2 * logits_rows * shape.vocab * shape.hidden
    attention = 4 * rows * seen * shape.query_width * shape.layers
    cache = 2 * shape.layers * shape.kv_width * seen * cache_bits // 8
    return _work(weights.layers + read + weights.head + cache, products, attention, int8=int8)


def stage_time(work: Work, mode: Mode, *, of_bandwidth: float | str, of_int8_rate: float | str) -> StageTime:
    """Time of `work` in a power mode, the longer of reading and computing.

    of_bandwidth, of_int8_rate: share of the limit that whole stages reach, or "unknown".
    """
    bandwidth, int8_rate, float_rate = mode.bandwidth_gb_s, mode.int8_dense_tops, mode.fp16_dense_tflops
    rates = {"bandwidth_gb_s": bandwidth, "int8_dense_tops": int8_rate, "fp16_dense_tflops": float_rate}
    missing = [name for name, rate in rates.items() if isinstance(rate, str)]
    if isinstance(bandwidth, str) or isinstance(int8_rate, str) or isinstance(float_rate, str):
        return StageTime(work, None, None, None, f"mode {mode.name!r} does not know its {', '.join(missing)}")
    read_ms = work.bytes / bandwidth / 1e6
    compute_ms = work.int8_operations / int8_rate / 1e9 + work.float_operations / float_rate / 1e9
    at_least = max(read_ms, compute_ms)
    bound_by: Literal["memory", "arithmetic"] = "memory" if read_ms >= compute_ms else "arithmetic"
    reads = computes = 0.0
    if not isinstance(of_bandwidth, str):
        reads = read_ms / of_bandwidth
    elif read_ms > NEGLIGIBLE * compute_ms:
        return StageTime(work, at_least, None, bound_by, f"{UNPUBLISHED} bandwidth is reached")
    if not isinstance(of_int8_rate, str):
        computes = work.operations / (int8_rate * of_int8_rate) / 1e9
    elif compute_ms > NEGLIGIBLE * read_ms:
        return StageTime(work, at_least, None, bound_by, f"{UNPUBLISHED} arithmetic is reached")
    return StageTime(work, at_least, max(reads, computes), bound_by, None)


def _work(size: int, products: int, attention: int, *, int8: bool) -> Work:
    return Work(size, products, attention) if int8 else Work(size, 0, products + attention)
