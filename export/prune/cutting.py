"""From the units that stay to the weights of a student: where each comes from, and what of it is taken."""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
import numpy as np
import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig
from sonoedge.export.prune.axes import HIDDEN, along, is_norm, spread_units
from sonoedge.export.prune.importance import Importance, Kept, norm_factor

_LAYER = re.compile(r"(model\.layers|visual\.blocks)\.(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\.moe\.experts)\.(\d+)\.(.*)")


class Cut(msgspec.Struct, frozen=True):
    """What a weight of the student is made of."""

    source: str  # the teacher's weight
    merged: str  # what merging calls it: the teacher's layer with the student's number of the expert
    rows: Tensor | None = None  # int64, in order; None: all
    columns: Tensor | None = None
    factor: float | None = None

    def taken(self, first: int, chunk: Tensor) -> Tensor:
        """What stays of some rows of the source, of which `first` is the number of the first; a copy."""
        part = chunk
        if self.rows is not None:
            begin, end = torch.searchsorted(self.rows, torch.tensor([first, first + chunk.shape[0]])).tolist()
            part = part.index_select(0, self.rows[begin:end] - first)
        if self.columns is not None:
            part = _columns(part, self.columns)
        if self.factor is not None:
            part = (part.float() * self.factor).to(chunk.dtype)
        return part.clone() if part is chunk else part


def cuts(keys: Iterable[str], teacher: ModelConfig, kept: Kept, importance: Importance) -> dict[str, Cut]:
    """What each weight of the student, named in `keys`, is made of."""
    found = {}
    for key in keys:
        merged = _renumbered(_LAYER, key, kept)
        source = _renumbered(_EXPERT, merged, kept)
        axes = along(source, teacher.head_dim)
        rows, columns = _indices(kept, axes.rows, axes.unit_rows), _indices(kept, axes.columns, axes.unit_columns)
        factor = norm_factor(importance, kept, source) if HIDDEN in kept and is_norm(source) else None
        found[key] = Cut(source, merged, rows, columns, factor)
    return found


def _columns(matrix: Tensor, picked: Tensor) -> Tensor:
    """Some columns of a matrix; NumPy gathers them four times as fast as torch, and knows no bfloat16."""
    bits = matrix.view(torch.uint16) if matrix.dtype is torch.bfloat16 else matrix
    return torch.from_numpy(np.take(bits.numpy(), picked.numpy(), axis=1)).view(matrix.dtype)


def _renumbered(pattern: re.Pattern[str], key: str, kept: Kept) -> str:
    """The key with the number that the teacher has for what the student calls by its own."""
    match = pattern.match(key)
    if match is None:
        return key
    axis, number, rest = match.groups()
    return f"{axis}.{int(kept[axis][int(number)])}.{rest}" if axis in kept else key


def _indices(kept: Kept, axis: str | None, width: int) -> Tensor | None:
    return spread_units(kept[axis], width) if axis is not None and axis in kept else None
