"""Which samples make up each step, and which of them each process takes: the seed and a number decide, nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.export.corpus import Batch, Batches, Corpus, Sample
from sonoedge.export.packing import Grid


class Pass(msgspec.Struct, frozen=True):
    """Samples that go through the models together: their images have the same grids."""

    numbers: tuple[int, ...]  # of the draws, in the order of the batch
    batch: Batch


class Draws:
    """Draw 0, 1, 2, … of a corpus: every sample once before any comes again, in an order of the seed's.

    distinct: after so many the first come again, question by question (None: a phantom is asked anew each time).
    """

    def __init__(
        self, corpus: Corpus, collator: Batches, *, seed: int, distinct: int | None = None, in_order: bool = False
    ) -> None:
        """in_order: the questions of a sample follow each other, and later ones see earlier answers."""
        self._corpus, self._collator, self._seed = corpus, collator, seed
        self._distinct, self._in_order = distinct, in_order
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def number(self, draw: int) -> int:
        """The draw, among distinct ones, that `draw` repeats."""
        return draw if self._distinct is None else draw % self._distinct

    def sample(self, draw: int) -> Sample:
        """One draw; raises SonoEdgeError naming a file that cannot be read."""
        number = self.number(draw)
        epoch, place = divmod(number, len(self._corpus))
        sample = self._corpus.sample(int(self._order(epoch)[place]), np.random.default_rng([self._seed, 1, number]))
        if not self._in_order:
            return sample
        chained = (msgspec.structs.replace(branch, follows=i > 0) for i, branch in enumerate(sample.branches))
        return msgspec.structs.replace(sample, branches=tuple(chained))

    def passes(self, draws: Sequence[int], most: int) -> list[Pass]:
        """The draws as passes of at most `most` samples; raises SonoEdgeError naming a sample over the context."""
        groups: dict[tuple[Grid, ...], list[tuple[int, Sample]]] = defaultdict(list)
        for draw in draws:
            sample = self.sample(draw)
            groups[tuple(image.grid for image in sample.images)].append((self.number(draw), sample))
        made = []
        for grids, members in groups.items():
            rest = iter(members)
            while some := list(islice(rest, most)):
                numbers, samples = zip(*some, strict=True)
                made.append(Pass(numbers, self._collator.collate(grids, samples)))
        return made

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._corpus))


class Share(msgspec.Struct, frozen=True):
    """What one process does of every step."""

    batch: int  # samples of a step, all processes together
    process: int
    processes: int
    accumulate: int  # passes that the share is split into, where images have equal grids

    def draws(self, step: int) -> range:
        """The numbers of the draws that are this process's in a step."""
        return range(step * self.batch + self.process, (step + 1) * self.batch, self.processes)

    def steps(self, draws: Draws, first: int, last: int) -> Iterator[tuple[int, list[Pass]]]:
        """The passes of each step; the next step's are made while the caller works on this one's."""
        most = -(-self.batch // (self.processes * self.accumulate))
        with ThreadPoolExecutor(1, thread_name_prefix="draws") as ahead:
            waiting = ahead.submit(draws.passes, self.draws(first), most) if first < last else None
            for step in range(first, last):
                assert waiting is not None
                passes = waiting.result()
                if step + 1 < last:
                    waiting = ahead.submit(draws.passes, self.draws(step + 1), most)
                yield step, passes
