"""Importance by the sizes of weights alone, where no frames are there to measure on; every weight is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.shards import TensorHeader, row_chunks
from sonoedge.export.prune.axes import HIDDEN, LAYERS, VISION_LAYERS
from sonoedge.export.prune.importance import Importance, cut_axes, depth, kept_of
from sonoedge.export.side_by_side import THREADS, in_order, one_torch_thread
from sonoedge.progress import track

# The rows of a weight in order, a few at a time, in the type that they are kept in.
Pieces = Callable[[str], Iterator[Tensor]]
CHUNK_VALUES = 2**18  # 1 MiB as float32, which stays in a core's cache


def disk_pieces(headers: Mapping[str, TensorHeader]) -> Pieces:
    """Weights read from a checkpoint's files."""
    return lambda key: (chunk for _, chunk in row_chunks(headers[key], key, CHUNK_VALUES))


def memory_pieces(state: Mapping[str, Tensor]) -> Pieces:
    """Weights of a model in memory, in the chunks that they are read in from disk."""

    def pieces(key: str) -> Iterator[Tensor]:
        tensor = state[key]
        step = max(1, CHUNK_VALUES * tensor.shape[0] // max(1, tensor.numel()))
        for first in range(0, tensor.shape[0], step):
            yield tensor[first : first + step].cpu()

    return pieces


@torch.no_grad()
def weight_importance(teacher: ModelConfig, pieces: Pieces, student: ModelConfig) -> Importance:
    """Scores of every axis that is cut for `student`: the size of what a unit writes times that of what makes it."""
    depths = depth(None, teacher, student)
    axes = list(cut_axes(teacher, student, depths))
    scores: dict[str, Tensor] = {}
    with (
        one_torch_thread(),
        ThreadPoolExecutor(THREADS, "weigh") as pool,
        track("weigh the teacher's units", len(axes)) as advance,
    ):
        squares = _Squares(pieces, pool)
        for axis in axes:
            if axis.endswith(".self_attn.heads"):
                scores[axis] = _head_scores(squares, axis.removesuffix(".heads"), teacher)
            elif axis.startswith(VISION_LAYERS) and teacher.vision.windows is None:
                scores[axis] = squares.product(axis, ("fc1",), "fc2")
            elif axis != HIDDEN:
                scores[axis] = squares.product(axis, ("gate_proj", "up_proj"), "down_proj")
            advance(1, axis)
        if HIDDEN in axes:
            scores[HIDDEN] = _channel_scores(squares, teacher, kept_of(depths, LAYERS, teacher.num_hidden_layers))
    return Importance(scores, {})


class _Squares:
    """Sums of squares of weights along their rows and columns; what one reading gives is kept for the others."""

    def __init__(self, pieces: Pieces, pool: ThreadPoolExecutor) -> None:
        self._pieces, self._pool = pieces, pool
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
            rows, columns = zip(*in_order(_square_sums, self._pieces(key), self._pool), strict=True)
            self._known[key] = torch.cat(rows), torch.stack(columns).sum(0)
        return self._known[key]


def _square_sums(chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares along the rows and the columns of some rows, float64."""
    squares = (chunk if chunk.dim() > 1 else chunk.unsqueeze(1)).float().square()
    return squares.sum(1).double(), squares.sum(0).double()


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
