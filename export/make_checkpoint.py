"""`sonoedge make-checkpoint`: a checkpoint of any size in the released format with random weights, for benches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.byte_tokenizer import write_byte_tokenizer
from sonoedge.export.checkpoint_files import RANDOM_KEY
from sonoedge.export.finished_folder import complete_or_absent
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.config_json import read_config
from sonoedge.export.models.loading import empty_model
from sonoedge.export.models.saving import write_config_files
from sonoedge.export.random_weights import DTYPES, RandomWeights
from sonoedge.export.safetensors_writer import TensorSpec, write_weights
from sonoedge.progress import track

CONFIGS = Path(__file__).parent / "configs"
BESIDE_WEIGHTS_BYTES = 16_000_000  # configs, tokenizer and index take less

DType = Literal["bf16", "f16", "f32"]


class Made(msgspec.Struct, frozen=True):
    """What was written."""

    checkpoint: str
    parameters: int
    bytes: int  # of the weights
    files: int  # of the weights
    seconds: float


def run(config: str, random: bool, out: Path, seed: int, dtype: DType, as_json: bool) -> None:
    """The verb: write a random checkpoint of a packaged config, or of a config.json, to `out`."""
    if not random:
        raise SonoEdgeError("--random is missing: only random weights can be made, so say it")
    made = make_random_checkpoint(named_config(config), out, seed=seed, dtype=dtype)
    if as_json:
        print(msgspec.json.encode(made).decode())
        return
    print(f"{out}: {made.parameters:,} random parameters, {made.bytes / 1e9:.1f} GB in {made.files} files")


def named_config(name: str) -> ModelConfig:
    """A packaged config by name, or the one at a path (config.json or checkpoint folder); SonoEdgeError for neither."""
    packaged = {path.stem: path for path in sorted(CONFIGS.glob("*.json"))}
    if name not in packaged and not Path(name).exists():
        raise SonoEdgeError(
            f"config {name!r} is neither packaged nor a file: choose one of {', '.join(packaged)}, "
            "or give the path of a config.json"
        )
    return read_config(packaged.get(name, Path(name)))


def make_random_checkpoint(config: ModelConfig, out: Path, *, seed: int = 0, dtype: DType = "bf16") -> Made:
    """Write a random checkpoint of the shape `config` in bounded memory; equal arguments give equal bytes.

    Raises SonoEdgeError when `out` is not free or its disk is too small; nothing is then left.
    """
    began = time.monotonic()
    tensors = [
        TensorSpec(name, dtype.upper(), tuple(meta.shape)) for name, meta in empty_model(config).state_dict().items()
    ]
    size = sum(tensor.bytes for tensor in tensors)
    with complete_or_absent(out, size + BESIDE_WEIGHTS_BYTES) as partial:
        write_byte_tokenizer(config, partial)
        write_config_files(config, partial, DTYPES[dtype.upper()], None, {RANDOM_KEY: True}, {})
        weights = RandomWeights(seed)
        with track(f"write {size / 1e9:.1f} GB of random weights", size) as advance:

            def content(tensor: TensorSpec) -> Iterator[memoryview]:
                for piece in weights.pieces(tensor):
                    yield piece
                    advance(piece.nbytes)

            files = write_weights(partial, tensors, content)
    parameters = sum(tensor.values for tensor in tensors)
    return Made(str(out), parameters, size, files, round(time.monotonic() - began, 1))
