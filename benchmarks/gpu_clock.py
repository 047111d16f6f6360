"""Times on a CUDA GPU: work captured once in a graph, replayed, medians; and the rates that the GPU itself reaches."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 21
COPY_BYTES = 1 << 30  # far more than any cache
MATRIX = 8192  # rows, columns and depth of the product that sets the int8 rate


def graph_ms(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median milliseconds of `work` replayed as one CUDA graph; it runs once before, so that all is compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants a warm-up on a stream of its own
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return eager_ms(graph.replay, rounds)


def eager_ms(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median milliseconds of `work`, launched from Python."""
    work()
    found = []
    for _ in range(rounds):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        work()
        ended.record()
        ended.synchronize()
        found.append(float(began.elapsed_time(ended)))
    return statistics.median(found)


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """The vendor's product of int8 matrices [m, k] and [k, n] to int32 [m, n]; m is more than 16."""
    return torch._int_mm(left, right)  # noqa: SLF001 - torch has no other name for it


def copy_gb_s() -> float:
    """Gigabytes read and written a second by a copy inside the GPU's memory."""
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / graph_ms(lambda: target.copy_(source)) / 1e6


def int8_tops() -> float:
    """Tera-operations a second of the vendor's int8 product of large matrices."""
    left = torch.randint(-127, 128, (MATRIX, MATRIX), dtype=torch.int8, device="cuda")
    right = torch.randint(-127, 128, (MATRIX, MATRIX), dtype=torch.int8, device="cuda").t()
    return 2 * MATRIX**3 / graph_ms(lambda: int8_product(left, right)) / 1e9
