"""Training samples from phantoms or from a conversation file: images as patches, and what is asked about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from sonoedge.calibration.conversations import IMAGE_MARK, Conversation, read_conversations
from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.lessons import branches
from sonoedge.export.packing import Branch, Grid, PackedBatch, Packer
from sonoedge.runtime.preprocess import ImageSpec, Patches, preprocess
from sonoedge.runtime.sources.pictures import read_picture
from sonoedge.runtime.tokens import Tokenizer


class Sample(msgspec.Struct, frozen=True):
    """One case: its images and the questions about them."""

    images: tuple[Patches, ...]
    branches: tuple[Branch, ...]


class Corpus(Protocol):
    """Samples that can be drawn by index."""

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample `index`, its variations drawn by `rng`."""
        ...


class PhantomCorpus:
    """Phantoms, half of them mirrored, with questions in either language."""

    def __init__(self, pool: PhantomPool, spec: ImageSpec) -> None:
        self._pool, self._spec = pool, spec

    def __len__(self) -> int:
        return len(self._pool)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        frame = self._pool.mirrored(index) if rng.random() < 0.5 else self._pool[index]
        return Sample((frame.patches(self._spec),), tuple(branches(frame.truth, rng)))


class ConversationCorpus:
    """The cases of a conversation file in EchoVLM's format, each with an image; every exchange is its own branch."""

    def __init__(self, path: Path, spec: ImageSpec) -> None:
        self._cases: Sequence[Conversation] = read_conversations(path)
        self._spec = spec
        for case in self._cases:
            if not case.image:
                raise SonoEdgeError(f"conversations {path}: case {case.id!r} has no image: add one, or remove the case")

    def __len__(self) -> int:
        return len(self._cases)

    def sample(self, index: int, rng: np.random.Generator) -> Sample:  # noqa: ARG002 (a file's cases do not vary)
        case = self._cases[index]
        images = tuple(preprocess(read_picture(Path(path)), self._spec) for path in case.image)
        asked = tuple(Branch(question.replace(IMAGE_MARK, "").strip(), answer) for question, answer in case.exchanges)
        return Sample(images, asked)


class Batch(msgspec.Struct, frozen=True):
    """Samples of the same image grids, ready for the model."""

    patches: Tensor  # float32 [B · images · patches, 1176]
    grids: list[Grid]  # of every image
    packed: PackedBatch

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on `device`."""
        return Batch(self.patches.to(device), self.grids, self.packed.to(device))


class Batches:
    """Endless seeded batches of a corpus; the batch of a step depends on the seed and the step alone."""

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, spec: ImageSpec, *, size: int, seed: int, context: int
    ) -> None:
        self._corpus, self._tokenizer, self._spec = corpus, tokenizer, spec
        self._size, self._seed, self._context = size, seed, context
        self._packers: dict[tuple[Grid, ...], Packer] = {}

    def batch(self, step: int) -> Batch:
        """The batch of `step`: where image grids differ, the largest equal group among twice as many samples drawn."""
        rng = np.random.default_rng([self._seed, step])
        groups: dict[tuple[Grid, ...], list[Sample]] = defaultdict(list)
        for index in rng.integers(len(self._corpus), size=2 * self._size):
            sample = self._corpus.sample(int(index), rng)
            group = groups[tuple(image.grid for image in sample.images)]
            group.append(sample)
            if len(group) == self._size:
                break
        grids, samples = max(groups.items(), key=lambda item: len(item[1]))
        return self.collate(grids, samples)

    def collate(self, grids: tuple[Grid, ...], samples: Sequence[Sample]) -> Batch:
        """Samples whose images have `grids`, as one batch."""
        if grids not in self._packers:
            self._packers[grids] = Packer(self._tokenizer, grids, self._spec)
        values = [image.values for sample in samples for image in sample.images]
        packed = self._packers[grids].pack([sample.branches for sample in samples], context=self._context)
        return Batch(torch.from_numpy(np.concatenate(values)), list(grids) * len(samples), packed)

    def steps(self, first: int, last: int) -> Iterator[tuple[int, Batch]]:
        """The batches of steps `first` up to and without `last`."""
        for step in range(first, last):
            yield step, self.batch(step)


def open_corpus(data: str, spec: ImageSpec, pool: PhantomPool | None) -> Corpus:
    """The corpus that `data` names: "phantoms" (from `pool`) or the path of a conversation file."""
    if data == "phantoms":
        assert pool is not None  # rendered by the caller, who knows the seeds
        return PhantomCorpus(pool, spec)
    return ConversationCorpus(Path(data), spec)
