"""Cuts the tokens of one call into the fixed sizes that engines have, and pads what is cut."""

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.engine_manifest import Bucket
from sonoedge.errors import SonoEdgeError


class Chunk(msgspec.Struct, frozen=True):
    """Tokens `start` to `stop` of a call, which run together in `buckets[bucket]`."""

    start: int
    stop: int
    bucket: int

    def __len__(self) -> int:
        """How many tokens they are."""
        return self.stop - self.start


class LogitsRun(msgspec.Struct, frozen=True):
    """One run of a chunk: which of its rows give logits, and which rows of the call's answer those are."""

    rows: npt.NDArray[np.int64]  # [bucket.logits], padded
    answers: npt.NDArray[np.int64]  # [at most bucket.logits]


def plan_chunks(
    tokens: int,
    length: int,
    logits_rows: npt.NDArray[np.int64],
    buckets: Sequence[Bucket],
    has_room: Callable[[Bucket, int], bool],
) -> tuple[Chunk, ...]:
    """Cut `tokens` new tokens behind `length` cached ones into as few runs as there can be, each as small as can be.

    Every run reads every weight, so runs are saved before rows. `has_room` says whether all rows of a bucket can be
    written behind so many tokens. Raises SonoEdgeError where no bucket reads that far.
    """
    chunks: list[Chunk] = []
    start = 0
    while start < tokens:
        best: tuple[tuple[int, ...], Chunk] | None = None
        for number, bucket in enumerate(buckets):
            taken = min(tokens - start, bucket.rows, bucket.seen - length - start)
            if taken < 1 or not has_room(bucket, length + start):
                continue
            asked = np.count_nonzero((logits_rows >= start) & (logits_rows < start + taken))
            cost = (-taken, _runs(int(asked), bucket), bucket.rows, bucket.seen, bucket.logits)
            if best is None or cost < best[0]:
                best = (cost, Chunk(start, start + taken, number))
        if best is None:
            raise SonoEdgeError(
                f"no engine reads {length + start + 1} tokens: run `sonoedge engine` on this bundle again"
            )
        chunks.append(best[1])
        start = best[1].stop
    return tuple(chunks)


def logits_runs(chunk: Chunk, bucket: Bucket, logits_rows: npt.NDArray[np.int64]) -> tuple[LogitsRun, ...]:
    """How often a chunk runs, for `logits_rows` [r] of its call: once at least, since the cache must take it up.

    More rows than a bucket gives cost another run of the same tokens, which writes the same keys and values again.
    """
    answers = np.flatnonzero((logits_rows >= chunk.start) & (logits_rows < chunk.stop))
    size = bucket.logits
    parts = [answers[first : first + size] for first in range(0, _runs(len(answers), bucket) * size, size)]
    return tuple(
        LogitsRun(padded(logits_rows[part] - chunk.start if len(part) else np.zeros(1, np.int64), size), part)
        for part in parts
    )


def padded(array: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """`array` [..., n] with its last entry repeated up to [..., size].

    A row of padding so is a copy of a real one: what it computes is as finite, and wakes no further expert.
    """
    spare = [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])]
    return np.pad(array, spare, mode="edge")


def _runs(asked: int, bucket: Bucket) -> int:
    """Runs that give logits of `asked` rows."""
    return max(1, -(-asked // bucket.logits))
