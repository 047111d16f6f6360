"""Golden cases of a bundle: what the float model makes of a few samples, and how far the built graphs are from it."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np

from sonoedge.bundle import BundleWriter
from sonoedge.errors import SonoEdgeError
from sonoedge.export.corpus import Batches, Corpus
from sonoedge.export.layerwise import reference_logits
from sonoedge.export.recipe import Limits
from sonoedge.runtime.golden import GoldenCase
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

LEAST_BOUND = 0.02  # float32 sums in another order on another chip stay far below it, a broken kernel far above
MARGIN = 2.0
# Graphs that were too large to run at build: int8 of a deep model may be some tenths off, a broken kernel is off by 1.
UNMEASURED_BOUND = 0.6


class Recorded(msgspec.Struct, frozen=True):
    """How far the graphs are off, None where they were too large to run, and what a session may be off at most."""

    error: float | None
    bound: float


def record_golden(
    checkpoint: Path,
    session: Session | None,
    corpus: Corpus,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    limits: Limits,
    writer: BundleWriter,
) -> Recorded:
    """Record the float model's logits of `limits.golden_cases` samples, read block by block, as files of the bundle.

    session: the built graphs, None when they do not fit in memory. Raises SonoEdgeError when they give numbers that are
    not finite.
    """
    batches = Batches(corpus, tokenizer, spec, size=1, seed=1, context=limits.context)
    images, packed = [], []
    count = min(limits.golden_cases, len(corpus))
    for index in range(count):
        sample = corpus.sample(index * len(corpus) // count, np.random.default_rng(index))
        image = sample.images[0]
        asked = msgspec.structs.replace(sample, images=(image,), branches=sample.branches[:1])
        images.append(image)
        packed.append(batches.collate((image.grid,), [asked]))
    worst = 0.0
    for index, logits in enumerate(reference_logits(checkpoint, packed)):
        batch, image = packed[index].packed, images[index]
        ids, positions = batch.input_ids[0].numpy(), batch.positions[:, 0].numpy()
        case = GoldenCase(image.values, np.asarray(image.grid, np.int64), ids, positions, logits.numpy())
        case.save(writer.add(f"golden/{index}.npz"))
        if session is None:
            continue
        error = case.error(session)
        if not math.isfinite(error):
            raise SonoEdgeError(
                f"golden/{index}: the built graphs give numbers that are not finite: keep more products float in "
                "the recipe"
            )
        worst = max(worst, error)
    if session is None:
        return Recorded(None, UNMEASURED_BOUND)
    return Recorded(worst, max(LEAST_BOUND, round(MARGIN * worst, 4)))
