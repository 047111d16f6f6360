"""The rate at which this machine reads memory: what bounds decoding one token at a time.

python -m benchmarks.bandwidth [--threads 2] [--rounds 9]

Two readers sum or search a buffer far larger than any cache; the quicker one counts. The last line is JSON.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import msgspec
import numpy as np
import torch
import typer

BUFFER_BYTES = 1 << 30
THREADS, ROUNDS = 2, 9


class Bandwidth(msgspec.Struct, frozen=True):
    """What the quicker reader reached."""

    reader: str
    threads: int
    median_gb_s: float
    max_gb_s: float


class Readers:
    """The buffer, and what reads all of it; `sample` once a round, then `result`."""

    def __init__(self, threads: int, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.threads = threads
        self._integers = np.ones(buffer_bytes // 8, np.int64)
        self._floats = torch.from_numpy(self._integers.view(np.float32))
        self._parts = np.array_split(self._integers, threads)
        self._pool = ThreadPoolExecutor(threads)
        self._samples: dict[str, list[float]] = {"torch sum": [], "numpy max": []}

    def sample(self) -> float:
        """Read the buffer once with each reader and return the quicker one's GB/s."""
        readers: dict[str, Callable[[], object]] = {"torch sum": self._torch_sum, "numpy max": self._numpy_max}
        rates = {}
        for name, read in readers.items():
            began = time.perf_counter()
            read()
            rates[name] = self._integers.nbytes / (time.perf_counter() - began) / 1e9
            self._samples[name].append(rates[name])
        return max(rates.values())

    def result(self) -> Bandwidth:
        """The reader with the higher median over all samples."""
        reader = max(self._samples, key=lambda name: statistics.median(self._samples[name]))
        rates = self._samples[reader]
        return Bandwidth(reader, self.threads, round(statistics.median(rates), 2), round(max(rates), 2))

    def _torch_sum(self) -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self._floats.sum()
        finally:
            torch.set_num_threads(before)

    def _numpy_max(self) -> object:
        return list(self._pool.map(np.max, self._parts))


def main(
    threads: Annotated[int, typer.Option(help="Threads that read.")] = THREADS,
    rounds: Annotated[int, typer.Option(help="Times that the buffer is read.")] = ROUNDS,
) -> None:
    """Measure how fast this machine reads memory."""
    readers = Readers(threads)
    for _ in range(rounds):
        readers.sample()
    found = readers.result()
    print(f"{found.median_gb_s} GB/s in the median, {found.max_gb_s} at most ({found.reader}, {threads} threads)")
    print(msgspec.json.encode(found).decode())


if __name__ == "__main__":
    typer.run(main)
