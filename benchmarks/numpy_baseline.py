"""What a full-size build is measured against: copying the checkpoint, and converting it to INT8 with numpy alone."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

CHUNK_VALUES = 2**20  # rows of a chunk stay in a core's caches, which is fastest here
INT8_LARGEST = 127


def copy_seconds(checkpoint: Path, copy: Path) -> float:
    """Copy a checkpoint folder and remove the copy again; gives the seconds of the copying."""
    began = time.monotonic()
    shutil.copytree(checkpoint, copy)
    seconds = time.monotonic() - began
    shutil.rmtree(copy)
    return seconds


def convert_seconds(checkpoint: Path, out: Path) -> float:
    """Convert every bfloat16 matrix to INT8 with one scale a row, all into the file `out`; gives the seconds.

    Raises ValueError for a checkpoint of another type.
    """
    began = time.monotonic()
    with out.open("wb") as written:
        for shard in sorted(checkpoint.glob("*.safetensors")):
            with shard.open("rb") as read:
                _convert_shard(read, written)
    return time.monotonic() - began


def _convert_shard(read: BinaryIO, written: BinaryIO) -> None:
    """One safetensors file: the length of its header in 8 bytes, the header, then the tensors without gaps."""
    header = json.loads(read.read(int.from_bytes(read.read(8), "little")))
    header.pop("__metadata__", None)
    for tensor in sorted(header.values(), key=lambda tensor: tensor["data_offsets"]):
        if tensor["dtype"] != "BF16":
            raise ValueError(f"{read.name} holds {tensor['dtype']}: this baseline reads BF16 alone")
        rows, *columns = tensor["shape"]
        width = int(np.prod(columns, dtype=np.int64))
        if not columns:  # a norm's weight or a bias stays float32
            written.write(_float32(np.fromfile(read, np.uint16, rows)).tobytes())
            continue
        step = max(1, CHUNK_VALUES // width)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            chunk = _float32(np.fromfile(read, np.uint16, count * width)).reshape(count, width)
            codes, scales = quantize_rows(chunk)
            written.write(codes.tobytes())
            written.write(scales.tobytes())


def quantize_rows(rows: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """INT8 [rows, columns] and the scale [rows] of float32 [rows, columns], which it overwrites."""
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))  # [rows]
    scales = np.where(largest > 0, largest / INT8_LARGEST, 1).astype(np.float32)
    rows *= (1 / scales)[:, None]
    return np.rint(rows, out=rows).astype(np.int8), scales


def _float32(bfloat16: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The values of bfloat16 bit patterns: float32 without its lower half."""
    wide = bfloat16.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)
