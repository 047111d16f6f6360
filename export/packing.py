"""Several questions about one image behind a shared prefix: each branch sees the prefix and itself, not its neighbours.

This is the very arrangement in which the runtime scores hints, so a model trained on packed samples meets nothing new
there. A branch that follows another sees that one too, as a later turn of a conversation does.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.positions import mrope_positions
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.prompt import HINT_LANGUAGE, answer_ids, next_turn_ids, prefix_ids, question_ids
from sonoedge.runtime.tokens import Tokenizer

Grid = tuple[int, int, int]

IGNORE = -100
HIDDEN = -1e9


class Branch(msgspec.Struct, frozen=True):
    """One question with the answer the model learns to give."""

    question: str
    answer: str
    name: str = "report"
    follows: bool = False  # the branch before it in the same conversation, which it sees


class PackedBatch(msgspec.Struct, frozen=True):
    """A batch of packed samples, padded on the right; padding sees only itself and is never a target."""

    input_ids: Tensor  # int64 [B, S]
    positions: Tensor  # int64 [3, B, S]
    attention_bias: Tensor  # float32 [B, 1, S, S], 0 where visible
    labels: Tensor  # int64 [B, S], the token that follows, IGNORE where nothing is learnt

    def to(self, device: torch.device) -> PackedBatch:
        """The batch with its tensors on `device`."""
        return PackedBatch(*(tensor.to(device) for tensor in msgspec.structs.astuple(self)))


class Packer:
    """Packs samples whose images have the same grids, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, grids: Sequence[Grid], spec: ImageSpec) -> None:
        self.tokenizer = tokenizer
        merged = [t * h * w // spec.merge_size**2 for t, h, w in grids]
        self.prefix = np.asarray(prefix_ids(tokenizer, merged, HINT_LANGUAGE), np.int64)  # [P]
        self.prefix_positions, self.next_position = mrope_positions(
            self.prefix, list(grids), image_token_id=tokenizer.image_pad, merge_size=spec.merge_size
        )

    def pack(self, samples: Sequence[Sequence[Branch]], *, context: int) -> PackedBatch:
        """Pack a list of branches for each sample; raises SonoEdgeError when one does not fit `context` tokens."""
        encoded = [[self._encode(branch) for branch in branches] for branches in samples]
        lengths = [self.prefix.size + sum(ids.size for ids, _ in branches) for branches in encoded]
        longest = max(lengths)
        if longest > context:
            raise SonoEdgeError(
                f"a sample with its images and questions has {longest} tokens and limits.context = {context}: raise it "
                "in the recipe, or shorten the sample"
            )
        batch, prefix = len(samples), self.prefix.size
        ids = np.full((batch, longest), self.tokenizer.eos, np.int64)
        labels = np.full((batch, longest), IGNORE, np.int64)
        positions = np.zeros((3, batch, longest), np.int64)
        visible = np.zeros((batch, longest, longest), bool)
        visible[:] = np.eye(longest, dtype=bool)
        ids[:, :prefix] = self.prefix
        positions[:, :, :prefix] = self.prefix_positions[:, None]
        visible[:, :prefix, :prefix] = np.tri(prefix, dtype=bool)
        for row, branches in enumerate(encoded):
            start = first = prefix
            for (branch, answered_from), told in zip(branches, samples[row], strict=True):
                end, first = start + branch.size, first if told.follows else start
                ids[row, start:end] = branch
                labels[row, start + answered_from - 1 : end - 1] = branch[answered_from:]
                positions[:, row, start:end] = self.next_position + np.arange(start - first, end - first)
                visible[row, start:end, :prefix] = True
                visible[row, start:end, first:end] = np.tri(branch.size, end - first, start - first, dtype=bool)
                start = end
        bias = torch.zeros(batch, 1, longest, longest).masked_fill_(~torch.from_numpy(visible)[:, None], HIDDEN)
        return PackedBatch(torch.from_numpy(ids), torch.from_numpy(positions), bias, torch.from_numpy(labels))

    def _encode(self, branch: Branch) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], int]:
        opening = next_turn_ids(self.tokenizer) if branch.follows else []
        question = opening + question_ids(self.tokenizer, branch.question)
        answer = answer_ids(self.tokenizer, branch.answer)
        return np.asarray(question + answer, np.int64), len(question)
