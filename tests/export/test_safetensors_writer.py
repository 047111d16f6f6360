"""Weights written as a stream are what safetensors itself reads, in shards of bounded size."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.shards import INDEX_FILE, SINGLE_FILE
from sonoedge.export.safetensors_writer import TensorSpec, split_shards, write_file, write_weights

TENSORS = [
    TensorSpec("b.weight", "F32", (3, 5)),
    TensorSpec("a.weight", "F16", (7,)),
    TensorSpec("c", "F32", ()),
    TensorSpec("d", "F32", (2, 2, 4)),
]
DTYPES = {"F32": np.float32, "F16": np.float16}


def value(tensor: TensorSpec) -> np.ndarray[tuple[int, ...], np.dtype[np.floating]]:
    numbers = np.arange(tensor.values) + len(tensor.name)
    return numbers.astype(DTYPES[tensor.dtype]).reshape(tensor.shape)


def in_pieces(tensor: TensorSpec) -> Iterator[memoryview]:
    """Pieces that are no whole values."""
    whole = memoryview(value(tensor).tobytes())
    for begin in range(0, len(whole), 3):
        yield whole[begin : begin + 3]


def test_a_file_reads_back(tmp_path: Path) -> None:
    write_file(tmp_path / "x.safetensors", TENSORS, in_pieces)
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == {tensor.name for tensor in TENSORS}
    for tensor in TENSORS:
        assert read[tensor.name].dtype == DTYPES[tensor.dtype]
        np.testing.assert_array_equal(read[tensor.name], value(tensor))
    with safe_open(tmp_path / "x.safetensors", "np") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0


def test_one_shard_is_a_file_without_an_index(tmp_path: Path) -> None:
    assert write_weights(tmp_path, TENSORS, in_pieces) == 1
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE_FILE]


def test_shards_come_with_their_index(tmp_path: Path) -> None:
    assert write_weights(tmp_path, TENSORS, in_pieces, largest_bytes=74) == 2
    index = msgspec.json.decode((tmp_path / INDEX_FILE).read_bytes())
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index == {
        "metadata": {"total_size": 60 + 14 + 4 + 64},
        "weight_map": {"b.weight": first, "a.weight": first, "c": second, "d": second},
    }
    assert load_file(tmp_path / first).keys() == {"a.weight", "b.weight"}
    np.testing.assert_array_equal(load_file(tmp_path / second)["d"], value(TENSORS[3]))


def test_a_tensor_larger_than_a_shard_has_one_of_its_own() -> None:
    assert split_shards(TENSORS, largest_bytes=16) == [[tensor] for tensor in TENSORS]


def test_too_few_bytes_are_told(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"3 of the 60 bytes of b\.weight were given"):
        write_file(tmp_path / "x", TENSORS, lambda _: iter([memoryview(b"abc")]))
