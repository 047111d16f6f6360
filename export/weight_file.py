"""The weights file of a bundle, written one row chunk after another: resumable, and never more than a chunk in memory.

Beside it lies a journal with one line a finished unit; a later run takes over the units whose bytes still have the hash
noted there and writes the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.errors import SonoEdgeError
from sonoedge.export.layout import Layout, Stored, Unit
from sonoedge.export.models.shards import TensorHeader
from sonoedge.export.scheme import quantize_rows
from sonoedge.progress import track

CHUNK_VALUES = 8 * 2**20  # 32 MiB as float32, a few times that while it is quantized
HASH_BYTES = 2**22


class CheckpointRows:
    """Rows of a checkpoint's tensors as float32, smoothed, one file open at a time."""

    def __init__(self, headers: dict[str, TensorHeader], smoothing: Smoothing) -> None:
        self._headers, self._smoothing = headers, smoothing
        self._open: tuple[Path, Any] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> CheckpointRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def chunks(self, key: str) -> Iterator[Tensor]:
        """The tensor of `key` in row chunks [rows, columns] ([rows] for vectors), first rows first."""
        header = self._headers[key]
        rows = header.shape[0]
        columns = header.parameters // rows
        step = max(1, CHUNK_VALUES // columns)
        part = self._file(header.file).get_slice(key)
        for first in range(0, rows, step):
            chunk = part[first : first + step].to(torch.float32)
            flat = chunk if chunk.dim() == 1 else chunk.flatten(1)
            yield self._smoothing.apply(key, flat, first)

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            self._stack.close()
            self._open = (path, self._stack.enter_context(safe_open(path, framework="pt")))
        return self._open[1]


class _Finished(msgspec.Struct, frozen=True):
    """One line of the journal."""

    name: str
    sha256: str


def write_weights(
    path: Path, layout: Layout, headers: dict[str, TensorHeader], smoothing: Smoothing, *, identity: str
) -> int:
    """Write every unit of `layout` to `path` and return how many were taken over from an earlier, halted run.

    identity: hash of all that decides the bytes; a journal of another identity is not trusted. Raises SonoEdgeError
    naming the tensor whose weights are not finite; OSError (a full disk) leaves the finished units for the next run.
    """
    journal = journal_of(path)
    finished = _read_journal(journal, identity)
    if not finished:
        path.unlink(missing_ok=True)
        journal.write_bytes(msgspec.json.encode(identity) + b"\n")
    kept = 0
    total = layout.weight_bytes()
    path.touch()
    with (
        path.open("r+b") as file,
        journal.open("ab") as notes,
        CheckpointRows(headers, smoothing) as rows,
        track("quantize weights", total) as advance,
    ):
        file.truncate(layout.size)
        for unit in layout.units:
            size = sum(part.length for part in unit.parts)
            if finished.get(unit.values.name) == (seen := _digest(file, unit) if unit.values.name in finished else ""):
                kept += 1
            else:
                _write_unit(file, unit, rows)
                file.flush()
                seen = _digest(file, unit)
                notes.write(msgspec.json.encode(_Finished(unit.values.name, seen)) + b"\n")
                notes.flush()
            advance(size, unit.values.name)
        os.fsync(file.fileno())
    return kept


def journal_of(path: Path) -> Path:
    """The journal beside a weights file."""
    return path.with_name(path.name + ".journal")


def _write_unit(file: BinaryIO, unit: Unit, rows: CheckpointRows) -> None:
    value_at = unit.values.offset
    scale_at = None if unit.scale is None else unit.scale.offset
    for key in unit.keys:
        for chunk in rows.chunks(key):
            if scale_at is None:
                value_at += _put(file, value_at, chunk)
                continue
            try:
                int8, scale = quantize_rows(chunk, unit.block)
            except SonoEdgeError as error:
                raise SonoEdgeError(f"{key}: {error}") from error
            value_at += _put(file, value_at, int8)
            scale_at += _put(file, scale_at, scale)


def _put(file: BinaryIO, offset: int, tensor: Tensor) -> int:
    """Write a tensor's bytes at `offset` and return how many."""
    data = tensor.contiguous().numpy()
    file.seek(offset)
    file.write(memoryview(data).cast("B"))
    return data.nbytes


def _digest(file: BinaryIO, unit: Unit) -> str:
    """SHA-256 of the bytes of a unit as they are in the file."""
    digest = hashlib.sha256()
    for part in unit.parts:
        for block in _read(file, part):
            digest.update(block)
    return digest.hexdigest()


def _read(file: BinaryIO, part: Stored) -> Iterator[bytes]:
    file.seek(part.offset)
    left = part.length
    while left and (block := file.read(min(left, HASH_BYTES))):
        left -= len(block)
        yield block


def _read_journal(journal: Path, identity: str) -> dict[str, str]:
    """Name to hash of what an earlier run of the same identity finished; the last line may be cut short."""
    if not journal.exists():
        return {}
    first, *lines = journal.read_bytes().splitlines()
    finished: dict[str, str] = {}
    with contextlib.suppress(msgspec.DecodeError):  # a line cut short by the halt ends what is known
        if msgspec.json.decode(first, type=str) != identity:
            return {}
        for line in lines:
            done = msgspec.json.decode(line, type=_Finished)
            finished[done.name] = done.sha256
    return finished
