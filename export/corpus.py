"""Samples from phantoms, conversation files or frames alone: images as patches, and what is asked about them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sonoedge.calibration.case_pictures import read_case_picture
from sonoedge.calibration.conversations import IMAGE_MARK, Conversation, read_conversations
from sonoedge.calibration.frames import Frames
from sonoedge.calibration.labelled_folder import is_labelled, read_labelled
from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.lessons import branches
from sonoedge.export.packing import Branch, Grid, PackedBatch, Packer
from sonoedge.export.possible_answers import possible_branches
from sonoedge.runtime.preprocess import ImageSpec, Patches, preprocess
from sonoedge.runtime.tokens import Tokenizer


class Sample(msgspec.Struct, frozen=True):
    """One case: its images and the questions about them."""

    images: tuple[Patches, ...]
    branches: tuple[Branch, ...]
    name: str  # in messages
    region: str | None = None  # where it is known


class Corpus(Protocol):
    """Samples that can be drawn by index, in an order that depends on the data alone."""

    @property
    def answered(self) -> bool:
        """Whether the answers are right ones, which a model may learn, or possible ones, to measure with."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the samples are read from."""
        ...

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def region(self, index: int) -> str | None:
        """What sample `index` shows, told without reading it; None where it is not known."""
        ...

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        """Sample `index`, its variations drawn by `rng`; raises SonoEdgeError naming a file that cannot be read."""
        ...


class PhantomCorpus:
    """Phantoms, half of them mirrored, with questions in either language."""

    answered = True
    files: tuple[Path, ...] = ()

    def __init__(self, pool: PhantomPool, spec: ImageSpec) -> None:
        self._pool, self._spec = pool, spec

    def __len__(self) -> int:
        return len(self._pool)

    def region(self, index: int) -> str | None:
        return self._pool.truths[index].region

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        frame = self._pool.mirrored(index) if rng.random() < 0.5 else self._pool[index]
        truth = frame.truth
        asked = tuple(branches(truth, rng))
        return Sample((frame.patches(self._spec),), asked, f"phantom {truth.seed}", truth.region)


class ConversationCorpus:
    """The cases of a conversation file in EchoVLM's format, each with an image; every exchange is its own branch."""

    answered = True

    def __init__(self, path: Path, spec: ImageSpec) -> None:
        self._cases: Sequence[Conversation] = read_conversations(path)
        self._path, self._spec = path, spec
        for case in self._cases:
            if not case.image:
                raise SonoEdgeError(f"conversations {path}: case {case.id!r} has no image: add one, or remove the case")

    @property
    def files(self) -> tuple[Path, ...]:
        return (self._path, *dict.fromkeys(Path(image) for case in self._cases for image in case.image))

    def __len__(self) -> int:
        return len(self._cases)

    def region(self, index: int) -> str | None:
        return self._cases[index].shown

    def sample(self, index: int, rng: np.random.Generator) -> Sample:  # noqa: ARG002 (a file's cases do not vary)
        case = self._cases[index]
        images = tuple(_patches(read_case_picture(Path(path)), path, self._spec) for path in case.image)
        asked = tuple(Branch(question.replace(IMAGE_MARK, "").strip(), answer) for question, answer in case.exchanges)
        return Sample(images, asked, f"case {case.id!r} of {self._path}", case.shown)


class LabelledCorpus(ConversationCorpus):
    """The pictures of a folder with a folder for each class, each asked for its class."""

    def __init__(self, path: Path, spec: ImageSpec) -> None:
        self._cases = read_labelled(path)
        self._path, self._spec = path, spec

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(Path(image) for case in self._cases for image in case.image)


class FrameCorpus:
    """Frames without questions, each asked for its hints and a report."""

    answered = False

    def __init__(self, frames: Frames, spec: ImageSpec) -> None:
        self._frames, self._spec = frames, spec

    @property
    def files(self) -> tuple[Path, ...]:
        return self._frames.files

    def __len__(self) -> int:
        return len(self._frames)

    def region(self, index: int) -> str | None:  # noqa: ARG002 (a picture does not say what it shows)
        return None

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        name = self._frames.name(index)
        return Sample((_patches(self._frames[index], name, self._spec),), possible_branches(index, rng), name)


class PartOf:
    """Some samples of another corpus."""

    def __init__(self, corpus: Corpus, picked: Sequence[int]) -> None:
        """Take the samples with the indices `picked`."""
        self._corpus, self._picked = corpus, picked
        self.answered, self.files = corpus.answered, corpus.files

    def __len__(self) -> int:
        return len(self._picked)

    def region(self, index: int) -> str | None:
        return self._corpus.region(self._picked[index])

    def sample(self, index: int, rng: np.random.Generator) -> Sample:
        return self._corpus.sample(self._picked[index], rng)


def _patches(picture: npt.NDArray[np.uint8], name: str, spec: ImageSpec) -> Patches:
    """Patches of a picture [H, W, 3]; raises SonoEdgeError naming one that is too long and thin."""
    try:
        return preprocess(picture, spec)
    except SonoEdgeError as error:
        raise SonoEdgeError(f"{name}: {error}") from error


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
        """Samples whose images have `grids`, as one batch; raises SonoEdgeError naming one longer than the context."""
        if grids not in self._packers:
            self._packers[grids] = Packer(self._tokenizer, grids, self._spec)
        values = [image.values for sample in samples for image in sample.images]
        packed = self._pack(self._packers[grids], samples)
        return Batch(torch.from_numpy(np.concatenate(values)), list(grids) * len(samples), packed)

    def _pack(self, packer: Packer, samples: Sequence[Sample]) -> PackedBatch:
        try:
            return packer.pack([sample.branches for sample in samples], context=self._context)
        except SonoEdgeError as error:
            if len(samples) == 1:
                raise SonoEdgeError(f"{samples[0].name}: {error}") from error
            for sample in samples:  # one of them is refused alone too
                self._pack(packer, [sample])
            raise

    def steps(self, first: int, last: int) -> Iterator[tuple[int, Batch]]:
        """The batches of steps `first` up to and without `last`."""
        for step in range(first, last):
            yield step, self.batch(step)


def open_corpus(data: str, spec: ImageSpec, pool: PhantomPool | None, *, labelled: bool = False) -> Corpus:
    """The corpus that `data` names: "phantoms" (from `pool`), a .json file of conversations, or frames.

    Frames are a picture, a DICOM file or a folder of either; labelled: pictures in a folder for each class are asked
    for the class instead, which a model can learn. Raises SonoEdgeError for data that holds no sample.
    """
    if data == "phantoms":
        assert pool is not None  # rendered by the caller, who knows the seeds
        return PhantomCorpus(pool, spec)
    path = Path(data)
    if path.suffix.lower() == ".json":
        return ConversationCorpus(path, spec)
    if labelled and is_labelled(path):
        return LabelledCorpus(path, spec)
    return FrameCorpus(Frames(path), spec)
