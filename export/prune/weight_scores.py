"""Importance by the sizes of weights alone, where no frames are there to measure on; every weight is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig
from sonoedge.export.prune.axes import HIDDEN, LAYERS, VISION_LAYERS
from sonoedge.export.prune.importance import Importance, cut_axes, depth, kept_of
from sonoedge.progress import track


class Readable(Protocol):
    """Weights that are read a few rows at a time."""

    config: ModelConfig

    def chunks(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """All rows of a weight in order, float32, each chunk with the number of its first row."""
        ...


def weight_importance(weights: Readable, student: ModelConfig) -> Importance:
    """Scores of every axis that is cut for `student`: the size of what a unit writes times that of what makes it."""
    teacher = weights.config
    depths = depth(None, teacher, student)
    axes = list(cut_axes(teacher, student, depths))
    scores: dict[str, Tensor] = {}
    squares = _Squares(weights)
    with track("weigh the teacher's units", len(axes)) as advance:
        for axis in axes:
            if axis.endswith(".self_attn.heads"):
                scores[axis] = _head_scores(squares, axis.removesuffix(".heads"), teacher)
            elif axis.startswith(VISION_LAYERS):
                scores[axis] = squares.product(axis, ("fc1",), "fc2")
            elif axis != HIDDEN:
                scores[axis] = squares.product(axis, ("gate_proj", "up_proj"), "down_proj")
            advance(1, axis)
        if HIDDEN in axes:
            scores[HIDDEN] = _channel_scores(squares, teacher, kept_of(depths, LAYERS, teacher.num_hidden_layers))
    return Importance(scores, {})


class _Squares:
    """Sums of squares of weights along their rows and columns; what one reading gives is kept for the others."""

    def __init__(self, weights: Readable) -> None:
        self._weights = weights
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def rows(self, key: str) -> Tensor:
        """Of each row, float64 [rows]."""
        return self._read(key)[0]

    def columns(self, key: str) -> Tensor:
        """Of each column, float64 [columns]."""
        return self._read(key)[1]

    def product(self, owner: str, into: Sequence[str], out: str) -> Tensor:
        """Scores of a feed-forward's inner units: squares of what goes in times squares of what goes out."""
        score = self.columns(f"{owner}.{out}.weight")
        for name in into:
            score = score * self.rows(f"{owner}.{name}.weight")
        return score

    def _read(self, key: str) -> tuple[Tensor, Tensor]:
        if key not in self._known:
            rows, columns = [], None
            for _, chunk in self._weights.chunks(key):
                matrix = chunk if chunk.dim() > 1 else chunk.unsqueeze(1)
                rows.append(torch.linalg.vector_norm(matrix, dim=1).double().square())
                part = torch.linalg.vector_norm(matrix, dim=0).double().square()
                columns = part if columns is None else columns + part
            assert columns is not None  # no weight is empty
            self._known[key] = torch.cat(rows), columns
        return self._known[key]


def _head_scores(squares: _Squares, attention: str, teacher: ModelConfig) -> Tensor:
    """Of a layer's heads [heads]: squares of what its values are made by, times squares of what they write."""
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    made = squares.rows(f"{attention}.v_proj.weight") + squares.rows(f"{attention}.v_proj.bias")
    written = squares.columns(f"{attention}.o_proj.weight").view(-1, teacher.head_dim).sum(1)
    return made.view(-1, teacher.head_dim).sum(1).repeat_interleave(group) * written


def _channel_scores(squares: _Squares, teacher: ModelConfig, layers: Sequence[int]) -> Tensor:
    """Of the hidden channels [hidden]: squares of everything that writes to them, a token's embedding on average."""
    score = squares.columns("model.embed_tokens.weight") / teacher.vocab_size
    score = score + squares.rows("visual.merger.mlp.2.weight") + squares.rows("visual.merger.mlp.2.bias")
    for layer in layers:
        name = f"{LAYERS}.{layer}"
        writers = [f"{name}.self_attn.o_proj.weight", f"{name}.mlp.down_proj.weight"]
        if teacher.moe is not None:
            writers.append(f"{name}.moe.shared_expert.down_proj.weight")
            writers += [f"{name}.moe.experts.{expert}.down_proj.weight" for expert in range(teacher.moe.num_experts)]
        for key in writers:
            score = score + squares.rows(key)
    return score
