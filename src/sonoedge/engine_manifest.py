"""What `engines/PROFILE/engines.json` of a bundle says: which engines were made from it, by what, for what."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.manifest import ENGINES_FOLDER

ENGINES_FILE = "engines.json"
FORMAT_VERSION = 1

Builder = Literal["tensorrt", "tensorrt_rtx"]
Count = Annotated[int, msgspec.Meta(gt=0)]

# How to get the library that builds and runs engines, as messages say it.
GET_BUILDER: dict[Builder, str] = {
    "tensorrt": (
        "on a Jetson it comes with JetPack (apt-get install python3-libnvinfer, then create the environment with "
        "--system-site-packages), elsewhere from NVIDIA's own package index"
    ),
    "tensorrt_rtx": "pip install 'sonoedge[rtx]', on x86-64",
}


class Bucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes that one optimization profile of an engine is made for, all of them fixed.

    Vision: `rows` is patches, the rest 0. Decoder and decode: `rows` is new tokens, `seen` is tokens of the cache that
    attention reads (the new ones among them), `images` is rows of image embeddings, `logits` is rows of logits.
    """

    rows: Count
    seen: int = 0
    images: int = 0
    logits: int = 0


class Engine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One plan file; optimization profile i serves `buckets[i]`."""

    stage: Literal["vision", "decoder", "decode"]
    path: str  # relative to the folder of this manifest
    sha256: str
    bytes: int
    buckets: tuple[Bucket, ...]
    cache_in_place: bool  # whether past and present of the KV cache must be one buffer
    workspace_bytes: int | None  # device memory that an execution needs beside weights; None where nobody could ask


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The golden check on the device: its largest relative error, or that no device could run it yet."""

    state: Literal["passed", "not run"]
    error: float | None = None


class EngineSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All engines of a bundle for one device profile."""

    format_version: int = FORMAT_VERSION
    profile: str
    sm: int
    builder: Builder
    builder_version: str
    driver: str | None  # version of the GPU driver where they were made; None on a host without one
    model: str  # `model.id` of the bundle that they were made from
    experts: Literal["plugins", "functions", "none"]  # how routed experts run
    kernels: str | None  # SHA-256 of the kernels' index, None without plugins
    engines: tuple[Engine, ...]
    golden: Golden


def engines_folder(bundle: Path, profile: str) -> Path:
    """Where the engines of a bundle for a profile are."""
    return bundle / ENGINES_FOLDER / profile


def read_engines(folder: Path) -> EngineSet:
    """Read what `sonoedge engine` wrote; raises SonoEdgeError when there is nothing, or nothing readable."""
    path = folder / ENGINES_FILE
    way_out = "run `sonoedge engine` on this bundle again"
    try:
        engines = msgspec.json.decode(path.read_bytes(), type=EngineSet)
    except OSError as error:
        raise SonoEdgeError(f"{path} cannot be read ({error.strerror}): {way_out}") from error
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise SonoEdgeError(f"{path} is damaged ({error}): {way_out}") from error
    if engines.format_version != FORMAT_VERSION:
        raise SonoEdgeError(
            f"{path} has format_version {engines.format_version} and this SonoEdge reads {FORMAT_VERSION}: {way_out}"
        )
    return engines
