"""The expert kernels on this GPU against the NumPy oracle, with every tile, before anything is timed."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from torch import Tensor

from benchmarks.expert_layers import Buffers, launch, outputs, random_inputs, random_layer
from sonoedge.export.plugins import oracle
from sonoedge.export.plugins.dispatch import DECODE, DECODE_TOKENS, PREFILL, Activation, Experts, Kernel, tiles

Array = npt.NDArray[Any]
# A step of each 16-bit type; of float32, what sums in another order and the GPU's exp may change.
ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-17}


class WrongResultError(Exception):
    """A kernel does not compute what it must."""


class Checked(msgspec.Struct, frozen=True):
    """What was compared, and the largest differences seen."""

    launches: int
    largest_step: int  # of int8 results that went through exp, whose last bits are the GPU's own
    steps_off: float  # their share of all
    largest_error: float  # of float results, as a share of the largest value


def check(experts: Experts, tokens: tuple[int, ...], activation: Activation, device: str = "cuda") -> Checked:
    """Compare all kernels, each on what the oracle hands it; raises WrongResultError naming the kernel and the tile."""
    layer = random_layer(experts, 1, device)
    found: list[tuple[int, float, float]] = []
    for count in tokens:
        for kernels in (PREFILL, DECODE) if count <= DECODE_TOKENS else (PREFILL,):
            buffers = {**layer, **random_inputs(experts, count, activation, count, device)}
            for kernel in kernels:
                buffers |= outputs((kernel,), experts, count, activation, device)
                expected = expected_outputs(kernel, experts, buffers, activation)
                for tile in tiles(kernel.operator, experts, count):
                    for buffer in kernel.outputs:
                        buffers[buffer.name].fill_(-1)
                    launch(kernel, experts, tile, count, buffers)
                    place = f"{kernel.operator}, tile {tile.name}, {count} tokens"
                    for buffer in kernel.outputs:
                        rounding = ROUNDING[activation if buffer.dtype == "A" else "float32"]
                        found.append(compare(place, array(buffers[buffer.name]), expected[buffer.name], rounding))
    steps, shares, errors = zip(*found, strict=True)
    return Checked(len(found), max(steps), max(shares), max(errors))


def array(tensor: Tensor) -> Array:
    """The tensor in NumPy, 16-bit floats as float32."""
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def expected_outputs(kernel: Kernel, experts: Experts, buffers: Buffers, activation: Activation) -> dict[str, Array]:
    """Output → what the oracle says of it; what kernels leave unwritten is -1, as `check` filled it."""
    given = {buffer.name: array(buffers[buffer.name]) for buffer in kernel.inputs}
    results = oracle.compute(kernel.operator, list(given.values()), experts, activation)
    expected = dict(zip((buffer.name for buffer in kernel.outputs), results, strict=True))
    if kernel.operator in ("ExpertUp", "ExpertDown"):
        (name,) = expected
        empty = np.repeat(given["block_expert"] == experts.experts, experts.block_rows)
        expected[name] = np.where(empty[:, None], np.asarray(-1, expected[name].dtype), expected[name])
    if kernel.operator == "ExpertUpDecode":
        chosen = np.any(oracle.chosen_experts(given["logits"], experts.chosen), axis=0)
        expected["inner_float"] = np.where(chosen[None, :, None], expected["inner_float"], np.float32(-1))
    return expected


def compare(place: str, found: Array, expected: Array, rounding: float) -> tuple[int, float, float]:
    """Largest step and share of int8 that are off by one, largest relative error; raises WrongResultError beyond."""
    if found.dtype == np.int32:
        if not np.array_equal(found, expected):
            raise WrongResultError(f"{place}: integers differ")
        return 0, 0.0, 0.0
    if found.dtype == np.int8:
        steps = np.abs(found.astype(np.int32) - expected)
        if steps.max() > 1 or (steps > 0).mean() > 1e-3:
            raise WrongResultError(f"{place}: {(steps > 0).mean():.1%} of int8 differ, by up to {steps.max()}")
        return int(steps.max()), float((steps > 0).mean()), 0.0
    error = float(np.abs(found.astype(np.float64) - expected).max() / max(np.abs(expected).max(), 1e-30))
    if not error <= 2 * rounding:  # also where it is no number
        raise WrongResultError(f"{place}: off by {error:.1e} of the largest value")
    return 0, 0.0, error
