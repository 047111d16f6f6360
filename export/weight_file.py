"""The weights file of a bundle, written one row chunk after another: resumable, and never more than a chunk in memory.

Beside it lies a journal with one line a finished unit; a later run takes over the units whose bytes still have the hash
noted there and writes the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.errors import SonoEdgeError
from sonoedge.export.layout import Layout, Stored, Unit
from sonoedge.export.models.shards import TensorHeader, row_chunks
from sonoedge.export.scheme import quantize_weight
from sonoedge.export.side_by_side import one_torch_thread
from sonoedge.progress import track

CHUNK_VALUES = 2**21  # 8 MiB as float32: small enough for the caches, large enough that Python costs nothing
THREADS = 2
HASH_BYTES = 2**22

Rows = npt.NDArray[np.float32]
_Chunk = tuple[Rows | npt.NDArray[np.int8], Rows | None]  # values and scales


def float_rows(values: Tensor) -> Rows:
    """Rows as float32 [rows, columns] ([rows] for vectors)."""
    flat = values if values.dim() == 1 else values.flatten(1)
    if flat.dtype is torch.bfloat16:  # its bits are the upper half of a float32's
        bits: Rows = (flat.view(torch.uint16).numpy().astype(np.uint32) << np.uint32(16)).view(np.float32)
        return bits
    return flat.to(torch.float32).numpy()


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
    path.touch()
    with (
        path.open("r+b") as file,
        journal.open("ab") as notes,
        one_torch_thread(),
        ThreadPoolExecutor(THREADS, "quantize") as pool,
        track("quantize weights", layout.weight_bytes()) as advance,
    ):
        file.truncate(layout.size)
        for unit in layout.units:
            name = unit.values.name
            if name in finished and finished[name] == _digest(file, unit):
                kept += 1
            else:
                seen = _write_unit(file, unit, headers, smoothing, pool)
                file.flush()
                notes.write(msgspec.json.encode(_Finished(name, seen)) + b"\n")
                notes.flush()
            advance(sum(part.length for part in unit.parts), name)
        os.fsync(file.fileno())
    return kept


def journal_of(path: Path) -> Path:
    """The journal beside a weights file."""
    return path.with_name(path.name + ".journal")


def _write_unit(
    file: BinaryIO, unit: Unit, headers: dict[str, TensorHeader], smoothing: Smoothing, pool: ThreadPoolExecutor
) -> str:
    """Write one unit, its chunks quantized by the pool while the next are read; returns the hash of its bytes."""
    digest = hashlib.sha256()
    scales: list[Rows] = []
    waiting: deque[Future[_Chunk]] = deque()

    def put_oldest() -> None:
        values, scale = waiting.popleft().result()
        data = np.ascontiguousarray(values).data.cast("B")
        file.write(data)
        digest.update(data)
        if scale is not None:
            scales.append(scale)

    file.seek(unit.values.offset)
    for key in unit.keys:
        for first, values in row_chunks(headers[key], key, CHUNK_VALUES):
            waiting.append(pool.submit(_ready, key, first, values, unit, smoothing))
            if len(waiting) > THREADS:
                put_oldest()
    while waiting:
        put_oldest()
    if unit.scale is not None:
        data = np.concatenate(scales).tobytes()
        file.seek(unit.scale.offset)
        file.write(data)
        digest.update(data)
    return digest.hexdigest()


def _ready(key: str, first: int, values: Tensor, unit: Unit, smoothing: Smoothing) -> _Chunk:
    """One chunk as it is stored: smoothed, and quantized where the unit has scales."""
    rows = float_rows(values)
    if key in smoothing.row_factors or key in smoothing.column_factors:
        rows = smoothing.apply(key, torch.from_numpy(rows), first).numpy()
    if unit.scale is None:
        if not np.isfinite(rows).all():
            raise SonoEdgeError(f"{key}: a weight is not finite: check the checkpoint")
        return rows, None
    try:
        return quantize_weight(rows, unit.block)
    except SonoEdgeError as error:
        raise SonoEdgeError(f"{key}: {error}") from error


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
    """Name to hash of what an earlier run of the same identity finished; a last line cut short by a halt is removed."""
    if not journal.exists():
        return {}
    data = journal.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    os.truncate(journal, len(whole))  # else the next line would be written behind it, and both be lost
    first, *lines = whole.splitlines() or [b""]
    finished: dict[str, str] = {}
    with contextlib.suppress(msgspec.DecodeError):  # a line that cannot be read ends what is known
        if msgspec.json.decode(first, type=str) != identity:
            return {}
        for line in lines:
            done = msgspec.json.decode(line, type=_Finished)
            finished[done.name] = done.sha256
    return finished
