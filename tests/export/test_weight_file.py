"""The weights file: the same bytes however it is cut and halted, each what quantizing a whole matrix gives."""

from __future__ import annotations

import errno
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.errors import SonoEdgeError
from sonoedge.export import weight_file
from sonoedge.export.layout import EMBEDDING, Layout, Stored, plan_layout
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import init_model, open_checkpoint, save_checkpoint
from sonoedge.export.models.shards import read_headers
from sonoedge.export.quantize import product_names
from sonoedge.export.scheme import QuantizationPlan, Scheme, quantize_weight
from sonoedge.export.weight_file import journal_of, write_weights

NARROW = "model.layers.0.mlp.down_proj.weight"


def mixed_plan(config: ModelConfig) -> QuantizationPlan:
    """Every kind of stored tensor: int8 by row and by block, float matrices, int8 embeddings."""
    schemes = dict.fromkeys(product_names(config), Scheme.W8A8)
    schemes |= {name: Scheme.W8A16_BLOCK for name in schemes if "self_attn" in name or name == "lm_head"}
    schemes |= {name: Scheme.FLOAT for name in schemes if name.endswith(("fc1", "layers.1.moe.experts"))}
    return QuantizationPlan({EMBEDDING: Scheme.W8A16} | schemes, {})


@pytest.fixture
def checkpoint(small_config: ModelConfig, tmp_path: Path) -> Path:
    """A random checkpoint in one float32 file, its rows of different sizes."""
    folder = tmp_path / "checkpoint"
    save_checkpoint(init_model(small_config, seed=1, std=0.2), folder)
    return folder


@pytest.fixture
def layout(small_config: ModelConfig) -> Layout:
    return plan_layout(small_config, mixed_plan(small_config))


def resave(checkpoint: Path, change: Callable[[str, Tensor], Tensor], shards: int = 1) -> Path:
    """A copy with other tensors, in one file or several."""
    folder = checkpoint.with_name("resaved")
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    tensors = {key: change(key, tensor) for key, tensor in load_file(checkpoint / "model.safetensors").items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {key: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, key in enumerate(tensors)}
    for name in set(files.values()):
        save_file({key: tensors[key] for key in tensors if files[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"weight_map": files}))
    return folder


def write(
    path: Path, layout: Layout, checkpoint: Path, smoothing: Smoothing | None = None, *, identity: str = "a"
) -> int:
    return write_weights(path, layout, read_headers(checkpoint), smoothing or Smoothing.none(), identity=identity)


def stored(path: Path, part: Stored) -> npt.NDArray[Any]:
    data = path.read_bytes()[part.offset : part.offset + part.length]
    return np.frombuffer(data, part.dtype).reshape(part.shape)


def check(path: Path, layout: Layout, tensors: dict[str, Tensor]) -> None:
    """Compare every unit with its float32 tensors, quantized whole."""
    assert path.stat().st_size == layout.size
    for unit in layout.units:
        wanted = np.concatenate([tensors[key].float().flatten(1 if tensors[key].dim() > 1 else 0) for key in unit.keys])
        if unit.scale is None:
            assert np.array_equal(stored(path, unit.values), wanted), unit.values.name
        else:
            int8, scale = quantize_weight(wanted, unit.block)
            assert np.array_equal(stored(path, unit.values), int8), unit.values.name
            assert np.array_equal(stored(path, unit.scale), scale), unit.values.name


@pytest.mark.parametrize("values", [2**21, 500, 1])
def test_chunks_of_any_size_give_what_whole_matrices_give(
    checkpoint: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: int
) -> None:
    monkeypatch.setattr(weight_file, "CHUNK_VALUES", values)
    sizes: list[int] = []

    def noted(rows: npt.NDArray[np.float32], block: int | None) -> Any:
        sizes.append(rows.size)
        return quantize_weight(rows, block)

    monkeypatch.setattr(weight_file, "quantize_weight", noted)
    assert write(tmp_path / "w", layout, checkpoint) == 0
    check(tmp_path / "w", layout, load_file(checkpoint / "model.safetensors"))
    widest = max(unit.values.shape[-1] for unit in layout.units if unit.scale is not None)
    assert max(sizes) <= max(values, widest)  # never more than a chunk, or one row, at once
    assert (len(sizes) > len(layout.units)) == (values < 2**21)


def test_the_same_bytes_twice(checkpoint: Path, layout: Layout, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, layout, checkpoint)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert journal_of(tmp_path / "one").read_bytes() == journal_of(tmp_path / "two").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shards", [1, 3])
def test_other_types_and_sharded_checkpoints(
    checkpoint: Path, layout: Layout, tmp_path: Path, dtype: torch.dtype, shards: int
) -> None:
    source = resave(checkpoint, lambda _key, tensor: tensor.to(dtype), shards)
    write(tmp_path / "w", layout, source)
    check(tmp_path / "w", layout, {k: v.to(dtype) for k, v in load_file(checkpoint / "model.safetensors").items()})


def test_smoothing_is_folded_in_chunk_by_chunk(
    checkpoint: Path, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_file, "CHUNK_VALUES", 300)
    tensors = load_file(checkpoint / "model.safetensors")
    norm, up, expert = (
        f"model.layers.0.{rest}.weight" for rest in ("input_layernorm", "mlp.up_proj", "moe.experts.3.up_proj")
    )
    generator = torch.Generator().manual_seed(1)

    def factors(count: int) -> Tensor:
        return torch.rand(count, generator=generator) + 0.5

    rows = {key: factors(tensors[key].shape[0]) for key in (norm, up)}
    columns = {key: factors(tensors[key].shape[1]) for key in (up, expert, NARROW)}
    write(tmp_path / "w", layout, checkpoint, Smoothing(rows, columns))
    for key, factor in rows.items():
        tensors[key] = tensors[key] * (factor if tensors[key].dim() == 1 else factor[:, None])
    for key, factor in columns.items():
        tensors[key] = tensors[key] * factor
    check(tmp_path / "w", layout, tensors)


class Halt(BaseException):
    """Stands for Ctrl-C."""


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the units that are written from now on."""
    seen: list[str] = []
    real = weight_file._write_unit

    def noted(file: Any, unit: Any, *rest: Any) -> str:
        seen.append(unit.values.name)
        return real(file, unit, *rest)

    monkeypatch.setattr(weight_file, "_write_unit", noted)
    return seen


def halt_after(units: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let the next runs fail in the middle of the unit after so many."""
    left = [units]
    real = weight_file._write_unit

    def halting(file: Any, unit: Any, *rest: Any) -> str:
        if not left[0]:
            file.seek(unit.values.offset)
            file.write(b"\xff" * (unit.values.length // 2))
            raise error
        left[0] -= 1
        return real(file, unit, *rest)

    monkeypatch.setattr(weight_file, "_write_unit", halting)


@pytest.fixture
def halted(checkpoint: Path, layout: Layout, tmp_path: Path, count: list[str]) -> Callable[[int], tuple[Path, bytes]]:
    """A file whose writing halted after some units, and what a whole one would be."""

    def make(units: int) -> tuple[Path, bytes]:
        write(tmp_path / "whole", layout, checkpoint)
        with pytest.MonkeyPatch.context() as patch:
            halt_after(units, patch, Halt())
            with pytest.raises(Halt):
                write(tmp_path / "w", layout, checkpoint)
        count.clear()
        return tmp_path / "w", (tmp_path / "whole").read_bytes()

    return make


@pytest.mark.parametrize("units", [0, 1, 9])
def test_a_halted_file_keeps_what_is_finished(
    halted: Callable[[int], tuple[Path, bytes]], checkpoint: Path, layout: Layout, count: list[str], units: int
) -> None:
    path, whole = halted(units)
    assert write(path, layout, checkpoint) == units
    assert count == [unit.values.name for unit in layout.units[units:]]
    assert path.read_bytes() == whole
    assert write(path, layout, checkpoint) == len(layout.units)  # and a finished one is kept whole


@pytest.mark.parametrize("part", ["values", "scale"])
def test_a_byte_that_changed_is_noticed(
    halted: Callable[[int], tuple[Path, bytes]], checkpoint: Path, layout: Layout, count: list[str], part: str
) -> None:
    path, whole = halted(len(layout.units) - 1)
    index = next(n for n, unit in enumerate(layout.units) if n > 3 and unit.scale is not None)
    place: Stored = getattr(layout.units[index], part)
    data = bytearray(path.read_bytes())
    data[place.offset + place.length - 1] ^= 1
    path.write_bytes(data)
    assert write(path, layout, checkpoint) == len(layout.units) - 2
    assert count == [layout.units[index].values.name, layout.units[-1].values.name]
    assert path.read_bytes() == whole


def test_a_file_cut_short_is_written_again_where_it_ends(
    halted: Callable[[int], tuple[Path, bytes]], checkpoint: Path, layout: Layout
) -> None:
    path, whole = halted(9)
    path.write_bytes(path.read_bytes()[: layout.units[4].values.offset + 3])
    assert 4 <= write(path, layout, checkpoint) < 9  # biases of zeros are what the file is filled up with
    assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 20])
def test_a_journal_cut_short_loses_its_last_line_only(
    halted: Callable[[int], tuple[Path, bytes]], checkpoint: Path, layout: Layout, cut: int, count: list[str]
) -> None:
    """And the lines that follow are read again by the run after the next halt."""
    path, whole = halted(6)
    journal = journal_of(path)
    journal.write_bytes(journal.read_bytes()[:-cut])
    with pytest.MonkeyPatch.context() as patch:
        halt_after(4, patch, Halt())
        with pytest.raises(Halt):
            write(path, layout, checkpoint)
    assert count == [unit.values.name for unit in layout.units[5:9]]
    assert write(path, layout, checkpoint) == 9
    assert path.read_bytes() == whole


@pytest.mark.parametrize("text", [b"", b"{", b'"a', b"\xff\xfe\n"])
def test_a_journal_that_says_nothing_is_begun_again(
    halted: Callable[[int], tuple[Path, bytes]], checkpoint: Path, layout: Layout, text: bytes
) -> None:
    path, whole = halted(3)
    journal_of(path).write_bytes(text)
    assert write(path, layout, checkpoint) == 0
    assert path.read_bytes() == whole
    assert write(path, layout, checkpoint) == len(layout.units)


def test_another_identity_starts_afresh(
    halted: Callable[[int], tuple[Path, bytes]], checkpoint: Path, layout: Layout
) -> None:
    path, _ = halted(6)
    source = resave(checkpoint, lambda _key, tensor: tensor * 2)
    assert write(path, layout, source, identity="b") == 0
    check(path, layout, load_file(source / "model.safetensors"))
    assert write(path, layout, source, identity="b") == len(layout.units)


KILLED = """
import sys, time
from pathlib import Path
from sonoedge.calibration.smoothing import Smoothing
from sonoedge.export import weight_file
from sonoedge.export.layout import Layout
from sonoedge.export.models.shards import read_headers
import msgspec

quantize = weight_file.quantize_weight
weight_file.quantize_weight = lambda rows, block: time.sleep(0.02) or quantize(rows, block)
weight_file.CHUNK_VALUES = 1000
checkpoint, layout, out = map(Path, sys.argv[1:])
layout = msgspec.json.decode(layout.read_bytes(), type=Layout)
weight_file.write_weights(out, layout, read_headers(checkpoint), Smoothing.none(), identity="a")
"""


def test_kill_9_loses_nothing_that_was_finished(checkpoint: Path, layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_bytes(msgspec.json.encode(layout))
    process = subprocess.Popen([sys.executable, "-c", KILLED, checkpoint, tmp_path / "layout.json", tmp_path / "w"])
    journal = journal_of(tmp_path / "w")
    while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = journal.read_bytes().count(b"\n") - 1
    assert 7 <= finished < len(layout.units)
    assert write(tmp_path / "w", layout, checkpoint) == finished
    check(tmp_path / "w", layout, load_file(checkpoint / "model.safetensors"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk too small for the file."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("waits for a system that lets its tests mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_keeps_what_is_finished(checkpoint: Path, layout: Layout, small_disk: Path) -> None:
    path = small_disk / "w"
    assert layout.size > 192 * 1024
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as full:
            write(path, layout, checkpoint)
        assert full.value.errno == errno.ENOSPC
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    kept = write(path, layout, checkpoint)
    print("kept:", kept)
    assert 3 < kept < len(layout.units)
    check(path, layout, load_file(checkpoint / "model.safetensors"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "key",
    [
        NARROW,
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.0.moe.experts.2.up_proj.weight",
        "visual.blocks.0.mlp.fc1.weight",  # float
        "model.norm.weight",
    ],
)
def test_a_weight_that_is_no_number_is_named(
    checkpoint: Path, layout: Layout, tmp_path: Path, key: str, wrong: float
) -> None:
    def spoil(name: str, tensor: Tensor) -> Tensor:
        if name == key:
            tensor.view(-1)[-1] = wrong
        return tensor.to(torch.bfloat16)

    source = resave(checkpoint, spoil)
    with pytest.raises(SonoEdgeError, match=rf"^{re.escape(key)}: a weight is not finite: check the checkpoint"):
        write(tmp_path / "w", layout, source)


def test_a_missing_shard_is_named(checkpoint: Path) -> None:
    source = resave(checkpoint, lambda _key, tensor: tensor, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SonoEdgeError, match=r"model-00002-of-00003.safetensors is missing"):
        open_checkpoint(source)
