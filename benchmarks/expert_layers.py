"""Layers of random int8 experts on a GPU, and the launches of the project's kernels on them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping

import msgspec
import torch
from torch import Tensor

from sonoedge.export.plugins.dispatch import (
    DECODE,
    DECODE_TOKENS,
    PREFILL,
    Activation,
    Experts,
    Kernel,
    Tile,
    grid,
    output_shapes,
    tiles,
)

Buffers = dict[str, Tensor]  # by the names that the kernels give their parameters
WEIGHTS = ("gate_up_values", "gate_up_scale", "down_values", "down_scale")


def random_layer(experts: Experts, seed: int, device: str = "cuda") -> Buffers:
    """Weights and scales of one layer, scaled so that activations keep their size."""
    seeded = torch.Generator(device).manual_seed(seed)
    count, hidden, inner = experts.experts, experts.hidden, experts.inner

    def integers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=seeded, device=device, dtype=torch.int8)

    def scale(of: float, *shape: int) -> Tensor:
        return of * (0.5 + torch.rand(shape, generator=seeded, device=device))

    return {
        "gate_up_values": integers(count, 2 * inner, hidden),
        "gate_up_scale": scale(hidden**-0.5 / 73, count, 2 * inner),  # 73: the deviation of such integers
        "down_values": integers(count, hidden, inner),
        "down_scale": scale(inner**-0.5 / 73, count, hidden),
        "input_scale": torch.full((1,), 4 / 127, device=device),
        "hidden_scale": torch.full((count,), 4 / 127, device=device),
    }


def random_inputs(experts: Experts, tokens: int, activation: Activation, seed: int, device: str = "cuda") -> Buffers:
    """x [tokens, hidden] and router logits [tokens, experts]."""
    seeded = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, experts.hidden, generator=seeded, device=device)
    logits = torch.randn(tokens, experts.experts, generator=seeded, device=device)
    return {"x": x.to(getattr(torch, activation)), "logits": logits}


def outputs(kernels: tuple[Kernel, ...], experts: Experts, tokens: int, activation: Activation, device: str) -> Buffers:
    """Room for what the kernels write."""
    types = {"A": getattr(torch, activation), "float32": torch.float32, "int8": torch.int8, "int32": torch.int32}
    return {
        buffer.name: torch.empty(shape, dtype=types[buffer.dtype], device=device)
        for kernel in kernels
        for buffer, shape in zip(kernel.outputs, output_shapes(kernel.operator, experts, tokens), strict=True)
    }


def launch(kernel: Kernel, experts: Experts, tile: Tile, tokens: int, buffers: Mapping[str, Tensor]) -> None:
    """Start one kernel; Triton compiles it at its first call."""
    function = getattr(importlib.import_module(f"sonoedge.export.plugins.{kernel.module}"), kernel.function)
    function[grid(kernel.operator, experts, tile, tokens)](
        *(buffers[buffer.name] for buffer in kernel.inputs),
        tokens,
        *(buffers[buffer.name] for buffer in kernel.outputs),
        **kernel.values(experts, tile),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def run_layers(
    kernels: tuple[Kernel, ...], experts: Experts, tokens: int, layers: list[Buffers], best: Mapping[str, Tile]
) -> None:
    """All layers, one after the other, on the current stream."""
    for buffers in layers:
        for kernel in kernels:
            launch(kernel, experts, best[kernel.operator], tokens, buffers)


class Tuned(msgspec.Struct, frozen=True):
    """The quickest tile of each operator, and its milliseconds a layer."""

    tiles: dict[str, Tile]
    ms: dict[str, float]


def tuned(
    kernels: tuple[Kernel, ...],
    experts: Experts,
    tokens: int,
    layers: list[Buffers],
    measure: Callable[[Callable[[], object]], float],
) -> Tuned:
    """Every tile of each operator measured over all layers, as TensorRT would; inputs are what the first tiles left."""
    first = {kernel.operator: tiles(kernel.operator, experts, tokens)[0] for kernel in kernels}
    run_layers(kernels, experts, tokens, layers, first)
    best, times = dict(first), {}
    for kernel in kernels:
        found: dict[float, Tile] = {}
        for tile in tiles(kernel.operator, experts, tokens):
            ms = measure(functools.partial(run_layers, (kernel,), experts, tokens, layers, {kernel.operator: tile}))
            found[ms / len(layers)] = tile
        times[kernel.operator] = min(found)
        best[kernel.operator] = found[min(found)]
    return Tuned(best, times)


def kernels_for(tokens: int) -> tuple[Kernel, ...]:
    """The operators of a pass over so many tokens."""
    return DECODE if tokens <= DECODE_TOKENS else PREFILL
