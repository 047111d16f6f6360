"""Calibration of a checkpoint of any size: its blocks are read, measured, smoothed and measured again one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.calibration.table import CalibrationTable
from sonoedge.errors import SonoEdgeError
from sonoedge.export.block_calibration import BlockCalibration
from sonoedge.export.corpus import Batch, Batches, Corpus
from sonoedge.export.recipe import Calibration
from sonoedge.export.streamed_model import Block, Passage, passage, stream
from sonoedge.export.weights import Weights
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer


class Calibrated(msgspec.Struct, frozen=True):
    """What calibration measured, and the factors that the weights had while it did."""

    table: CalibrationTable
    smoothing: Smoothing


@torch.no_grad()
def calibrate(
    checkpoint: Path, corpus: Corpus, tokenizer: Tokenizer, spec: ImageSpec, settings: Calibration, context: int
) -> Calibrated:
    """Run `settings.frames` samples with their questions and answers through the float model, block by block.

    Raises SonoEdgeError when the corpus holds fewer frames, naming the product whose activations are not finite, and,
    as soon as its layer is done, naming an expert that saw too few tokens.
    """
    passages = calibration_passages(corpus, tokenizer, spec, settings, context)
    weights = Weights(checkpoint)
    calibration = BlockCalibration(weights, settings)
    stream(weights, passages, calibration.through, "calibrate")
    return Calibrated(calibration.table, calibration.smoothing)


def calibration_passages(
    corpus: Corpus, tokenizer: Tokenizer, spec: ImageSpec, settings: Calibration, context: int
) -> list[Passage]:
    """The samples that calibration runs on, each with its questions and answers; SonoEdgeError for too few."""
    if len(corpus) < settings.frames:
        raise SonoEdgeError(
            f"calibration.frames = {settings.frames} and the data holds {len(corpus)}: give more data, or ask for "
            "fewer frames"
        )
    batches = Batches(corpus, tokenizer, spec, size=1, seed=0, context=context)
    passages = []
    for index in range(settings.frames):
        # Evenly spread: sorted folders and clips begin with frames that are all alike.
        sample = corpus.sample(index * len(corpus) // settings.frames, np.random.default_rng(index))
        batch = batches.collate(tuple(image.grid for image in sample.images), [sample])
        passages.append(passage(batch, sample.region))
    return passages


@torch.no_grad()
def reference_logits(checkpoint: Path, batches: Sequence[Batch], rows: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Logits of the float model for batches of one sequence each, its weights read block by block.

    rows: int64 [r] picks tokens of every sequence, None takes all; gives float32 [r, vocab] each.
    """
    hidden = final_hidden(checkpoint, batches, rows)
    return head_logits(Weights(checkpoint), hidden)


@torch.no_grad()
def final_hidden(checkpoint: Path, batches: Sequence[Batch], rows: Sequence[Tensor] | None = None) -> list[Tensor]:
    """What the head of the float model reads: float32 [r, hidden] for each batch; see `reference_logits`."""
    passages = [passage(batch) for batch in batches]

    def through(block: Block, some: Sequence[Passage]) -> None:
        for one in some:
            one.x = block.run(one)

    stream(Weights(checkpoint), passages, through, "run the float model")
    hidden = [one.x[0] for one in passages]  # [S, hidden] each
    return hidden if rows is None else [x[picked] for x, picked in zip(hidden, rows, strict=True)]


@torch.no_grad()
def head_logits(weights: Weights, hidden: Sequence[Tensor]) -> list[Tensor]:
    """Logits [r, vocab] of final hidden states [r, hidden], the head's rows read a few at a time."""
    logits = [torch.empty(x.shape[0], weights.config.vocab_size) for x in hidden]
    for first, part in weights.chunks(weights.head_key):
        for x, out in zip(hidden, logits, strict=True):
            out[:, first : first + part.shape[0]] = x @ part.T
    return logits
