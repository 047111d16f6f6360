"""The tensors of a checkpoint folder, known from the headers of its safetensors files without reading any weight."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sonoedge.errors import SonoEdgeError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
LISTED_KEYS = 8


class TensorHeader(msgspec.Struct, frozen=True):
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' own name: F32, BF16, …

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.parameters * FLOAT_BYTES[self.dtype]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Headers of all tensors in a single or sharded checkpoint; SonoEdgeError names a missing or damaged file."""
    if not folder.is_dir():
        raise SonoEdgeError(f"{folder} is not a folder; give a checkpoint folder with config.json and {SINGLE_FILE}.")
    if (folder / SINGLE_FILE).is_file():
        return _file_headers(folder / SINGLE_FILE)
    index_file = folder / INDEX_FILE
    if not index_file.is_file():
        raise SonoEdgeError(
            f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; copy the weights beside config.json."
        )
    weight_map = _read_index(index_file)
    headers: dict[str, TensorHeader] = {}
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != Path(name).name:
            raise SonoEdgeError(f"{index_file} names {name!r}, which is not a file of this folder; correct weight_map.")
    for name in names:
        if not (folder / name).is_file():
            raise SonoEdgeError(f"{folder / name} is missing but {INDEX_FILE} names it; copy that shard too.")
        found = _file_headers(folder / name)
        expected = {key for key, shard in weight_map.items() if shard == name}
        if found.keys() != expected:
            raise SonoEdgeError(
                f"{folder / name} and {INDEX_FILE} disagree about {listed(found.keys() ^ expected)}; copy both again."
            )
        headers |= found
    return headers


def read_tensors(headers: dict[str, TensorHeader], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor converted to `dtype`, one file open at a time, one tensor in memory at a time."""
    by_file: dict[Path, list[str]] = {}
    for key, header in headers.items():
        by_file.setdefault(header.file, []).append(key)
    for file, keys in by_file.items():
        with open_shard(file) as shard:
            for key in keys:
                yield key, shard.get_tensor(key).to(dtype)


def listed(keys: Any) -> str:
    """Keys in order, at most eight of them and how many more there are."""
    names = sorted(keys)
    more = f" and {len(names) - LISTED_KEYS} more" if len(names) > LISTED_KEYS else ""
    return ", ".join(names[:LISTED_KEYS]) + more


def _read_index(file: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(file.read_bytes(), type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"{file} is not a shard index ({error}); copy it again.") from error


def _file_headers(file: Path) -> dict[str, TensorHeader]:
    headers = {}
    with open_shard(file) as shard:
        for key in shard.keys():  # noqa: SIM118 (not a dict)
            part = shard.get_slice(key)
            header = TensorHeader(file, tuple(part.get_shape()), part.get_dtype())
            if header.dtype not in FLOAT_BYTES:
                raise SonoEdgeError(
                    f"{file}: {key} is {header.dtype}; only float weights (F32, F16, BF16) are supported."
                )
            headers[key] = header
    return headers


def row_chunks(header: TensorHeader, key: str, most_values: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows of a tensor in order as the file has them, at most `most_values` at a time (but a whole row).

    Each chunk comes with the number of its first row. SonoEdgeError when the file has gone or is damaged.
    """
    rows = header.shape[0]
    step = max(1, most_values * rows // max(1, header.parameters))
    with open_shard(header.file) as shard:
        part = shard.get_slice(key)
        for first in range(0, rows, step):
            yield first, part[first : first + step]


def open_shard(file: Path) -> Any:
    """Open a safetensors file for torch; SonoEdgeError when it is not there whole."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SonoEdgeError(f"{file} is not a whole safetensors file ({error}); copy it again.") from error
