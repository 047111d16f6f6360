"""Writes a student's folder, its weights cut out of the teacher's shards a few rows at a time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import torch

from sonoedge.export.checkpoint_files import RANDOM_KEY, is_random
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.config_json import config_tree
from sonoedge.export.models.loading import empty_model
from sonoedge.export.models.shards import TensorHeader, row_chunks
from sonoedge.export.pinning import BESIDE, torch_dtype
from sonoedge.export.prune.cutting import Cut
from sonoedge.export.prune.vocabulary import Trimmed
from sonoedge.export.safetensors_writer import TensorSpec, write_weights
from sonoedge.export.side_by_side import THREADS, in_order, one_torch_thread
from sonoedge.progress import track

CHUNK_VALUES = 2**21  # 4 MiB as bfloat16


def student_specs(
    student: ModelConfig, cut: Mapping[str, Cut], headers: Mapping[str, TensorHeader]
) -> list[TensorSpec]:
    """Every weight of the student, in the type that the teacher keeps it in."""
    shapes = {key: tuple(tensor.shape) for key, tensor in empty_model(student).state_dict().items()}
    return [TensorSpec(key, headers[cut[key].source].dtype, shape) for key, shape in shapes.items()]


def write_student_weights(
    folder: Path,
    specs: list[TensorSpec],
    cut: Mapping[str, Cut],
    headers: Mapping[str, TensorHeader],
    merged: Mapping[str, TensorHeader],
) -> None:
    """Write the weights `specs` of a student; merged: weights that merging made, by its own keys."""
    with (
        one_torch_thread(),
        ThreadPoolExecutor(THREADS, "cut") as pool,
        track("write the student", sum(spec.bytes for spec in specs)) as advance,
    ):

        def content(spec: TensorSpec) -> Iterator[memoryview]:
            one = cut[spec.name]
            key = one.merged if one.merged in merged else one.source
            header = merged[key] if key in merged else headers[key]
            chunks = row_chunks(header, key, CHUNK_VALUES)
            for taken in in_order(lambda item: one.taken(*item), chunks, pool):
                yield taken.contiguous().flatten().view(torch.uint8).numpy().data
                advance(taken.nbytes)

        write_weights(folder, specs, content)


def write_student_files(
    checkpoint: Path, student: ModelConfig, trimmed: Trimmed | None, dtype: str, folder: Path
) -> None:
    """Write config.json and the teacher's files beside it, with the student's token ids where they differ."""
    name = str(torch_dtype(dtype)).removeprefix("torch.")
    tree = config_tree(student) | {"torch_dtype": name, RANDOM_KEY: is_random(checkpoint)}
    (folder / "config.json").write_bytes(msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
    for beside in BESIDE:
        if trimmed is not None and beside in trimmed.files:
            (folder / beside).write_bytes(trimmed.files[beside])
        elif (checkpoint / beside).is_file():
            shutil.copyfile(checkpoint / beside, folder / beside)
