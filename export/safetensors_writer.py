"""Writes safetensors files as a stream, so that a checkpoint may be larger than memory.

The format: https://github.com/huggingface/safetensors#format
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.shards import FLOAT_BYTES, INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 5_000_000_000  # what released checkpoints are split at
ALIGNMENT = 8  # the data begins at a multiple of it, as in the files that safetensors itself writes


class TensorSpec(msgspec.Struct, frozen=True):
    """A tensor to be written."""

    name: str
    dtype: str  # safetensors' own name: F32, BF16, …
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many values it holds."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes its values take."""
        return self.values * FLOAT_BYTES[self.dtype]


Content = Callable[[TensorSpec], Iterator[memoryview]]  # the bytes of a tensor, row-major, little-endian, in pieces


def split_shards(tensors: Sequence[TensorSpec], largest_bytes: int = SHARD_BYTES) -> list[list[TensorSpec]]:
    """Tensors in their order, each shard at most `largest_bytes` of values unless one tensor alone is larger."""
    shards: list[list[TensorSpec]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.bytes > room:
            shards.append([])
            room = largest_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    return shards


def write_weights(
    folder: Path, tensors: Sequence[TensorSpec], content: Content, *, largest_bytes: int = SHARD_BYTES
) -> int:
    """Write the weights of a checkpoint into `folder`, one file or shards with their index; gives the number of files.

    `content` is called once a tensor, in order; its pieces are written as they come and never gathered.
    Raises SonoEdgeError when the pieces of a tensor do not add up to its size.
    """
    shards = split_shards(tensors, largest_bytes)
    if len(shards) == 1:
        write_file(folder / SINGLE_FILE, tensors, content)
        return 1
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(folder / name, shard, content)
        weight_map |= {tensor.name: name for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.bytes for tensor in tensors)}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(index)) + b"\n")
    return len(shards)


def write_file(path: Path, tensors: Sequence[TensorSpec], content: Content) -> None:
    """Write one safetensors file; raises SonoEdgeError when the pieces of a tensor do not add up to its size."""
    with path.open("wb", buffering=0) as file:
        _write_all(file.write, memoryview(_header(tensors)))
        for tensor in tensors:
            written = 0
            for piece in content(tensor):
                _write_all(file.write, piece)
                written += piece.nbytes
            if written != tensor.bytes:
                raise SonoEdgeError(
                    f"{path}: {written} of the {tensor.bytes} bytes of {tensor.name} were given: "
                    "this is a defect, report it"
                )


def _header(tensors: Sequence[TensorSpec]) -> bytes:
    """The length of the header in 8 bytes, then the header: where each tensor lies, counted from the header's end."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (begin, end)}
        begin = end
    text = msgspec.json.encode(entries)
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_all(write: Callable[[memoryview], int | None], piece: memoryview) -> None:
    """Write every byte: a raw file may take fewer than it is given, 2 GiB at most on Linux."""
    rest = piece.cast("B")
    while rest:
        rest = rest[write(rest) or 0 :]
