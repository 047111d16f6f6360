"""What `manifest.json` of a bundle says: the typed definition that the build writes and the runtime reads."""

import datetime
import hashlib
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Literal

import msgspec

from sonoedge.errors import SonoEdgeError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.json.sig"  # over the manifest's bytes, so outside its list of files
TOKENIZER_FILE = "tokenizer.json"
HINT_SCHEMA_FILE = "hint_schema.toml"
GRAPHS_FOLDER = "graphs"
GOLDEN_FOLDER = "golden"
ENGINES_FOLDER = "engines"  # made on the device, with a manifest of their own, so outside the list of files


class ImageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model wants its pictures; the pixel bounds hold after resizing."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 196 * 28 * 28
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


class DecoderSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The decoder's sizes; `context` is the capacity of the KV cache in tokens."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    image_token_id: int
    eos_token_ids: tuple[int, ...]


class ExpertsSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The routed experts of every layer: a token takes `chosen`, each `inner` wide between vectors of `hidden`."""

    experts: int
    chosen: int
    hidden: int
    inner: int
    norm_topk_prob: bool


class Model(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which model the bundle holds; `id` is filled in when the bundle is committed."""

    name: str
    architecture: str
    parameters: int
    random: bool  # random weights: good for benches, worthless for answers
    id: str = ""


class Hashes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """SHA-256 of what the model was made from; None where the build used none."""

    recipe: str | None
    calibration: str | None
    prompt: str  # hint schema and system prompts


class Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One ONNX graph: for ONNX Runtime ("ort"), as portable Q/DQ ("qdq"), or in 16 bit for TensorRT ("trt").

    "decoder" takes any number of tokens; "decode", where a bundle has it, is the same model laid out for one at a time.
    "trt-plugins" is "trt" with the routed experts as plugins whose kernels the bundle carries.
    """

    purpose: Literal["vision", "decoder", "decode"]
    formulation: Literal["ort", "qdq", "trt", "trt-plugins"]
    path: str


class StageCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one run of a stage reads and computes; None where the build could not tell."""

    bytes: int | None = None
    operations: int | None = None


class HintCalibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What turns one hint's scores into a probability that can be trusted, and when it is too low to speak."""

    temperature: float = 1.0
    abstain_below: float = 0.0
    scale: tuple[float, ...] = ()  # vector scaling, a number a candidate; () for none
    shift: tuple[float, ...] = ()
    platt: tuple[float, float] | None = None  # slope and intercept on the log-odds of the likeliest candidate
    coverage: float | None = None  # share of frames whose set of candidates holds the right one; None: never measured
    set_floor: float = 0.0  # least probability in the set
    set_floors: dict[str, float] = {}  # the same where the quality hint says this, if it differs


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Inputs with reference outputs; a session that differs by more than `bound` must not serve."""

    path: str  # a file, or the folder that holds the files
    bound: float


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of the bundle."""

    sha256: str
    bytes: int


class Contents(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the build knows about a bundle; `BundleWriter.commit` adds the rest."""

    model: Model
    hashes: Hashes
    toolchain: dict[str, str]  # library → version
    profile: str
    intended_use: str
    image: ImageSpec
    decoder: DecoderSpec
    graphs: tuple[Graph, ...]
    golden: Golden
    stages: dict[str, StageCost] = {}
    hint_calibration: dict[str, HintCalibration] = {}
    familiarity: str | None = None
    experts: ExpertsSpec | None = None  # None for a dense model
    preset: str | None = None  # the region whose routing chose the experts; None: all of them are there
    kernels: str | None = None  # index of the plugins' kernels, compiled for the bundle's profile

    def paths(self) -> tuple[str, ...]:
        """Every path that the contents name."""
        optional = tuple(path for path in (self.familiarity, self.kernels) if path is not None)
        return (*(graph.path for graph in self.graphs), self.golden.path, *optional)


class Manifest(Contents, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole of `manifest.json`."""

    format_version: int
    created: datetime.datetime
    tool_version: str
    files: dict[str, FileEntry]  # path relative to the bundle → what it must hold


class _Versioned(msgspec.Struct):
    """The one field that every format version has."""

    format_version: int


def decode_manifest(data: bytes) -> Manifest:
    """Parse `manifest.json`; raises SonoEdgeError naming the key for anything unreadable or of another version."""
    try:
        version = msgspec.json.decode(data, type=_Versioned).format_version
        if version == FORMAT_VERSION:
            manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise SonoEdgeError(f"{MANIFEST_FILE} cannot be read ({error}): build the bundle again") from error
    if version > FORMAT_VERSION:
        raise SonoEdgeError(
            f"{MANIFEST_FILE} has format_version {version} and this SonoEdge reads up to {FORMAT_VERSION}: "
            "install a newer SonoEdge"
        )
    if version < FORMAT_VERSION:
        raise SonoEdgeError(f"{MANIFEST_FILE} has format_version {version}, which never was: build the bundle again")
    check_agreement(manifest, manifest.files)
    if manifest.model.id != (expected := model_id(manifest.graphs, manifest.files)):
        raise SonoEdgeError(
            f"{MANIFEST_FILE} gives model.id {manifest.model.id} but its graphs give {expected}: build the bundle again"
        )
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """Return `manifest.json` as it is written, indented so that a person can read it."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def check_agreement(contents: Contents, files: Mapping[str, FileEntry]) -> None:
    """Raise SonoEdgeError when the contents name a path that is no file (for golden: or folder) of the bundle."""
    folders = {str(parent) for name in files for parent in PurePosixPath(name).parents}
    for path in contents.paths():
        if path not in files and not (path == contents.golden.path and path in folders - {"."}):
            raise SonoEdgeError(f"{MANIFEST_FILE} names {path}, which is not among its files: build the bundle again")
    for name in files:
        check_name(name)


def check_name(name: str) -> None:
    """Raise SonoEdgeError unless `name` is a plain relative path that stays inside the bundle."""
    path = PurePosixPath(name)
    plain = str(path) == name and not path.is_absolute() and ".." not in path.parts and name != "."
    if not plain or "\\" in name or not name.isprintable():
        raise SonoEdgeError(f"{name!r} is not a plain path inside the bundle: a bundle holds files under itself only")
    if name in (MANIFEST_FILE, SIGNATURE_FILE) or path.parts[0] == ENGINES_FOLDER:
        raise SonoEdgeError(f"{name!r} cannot be among the files of a bundle: the name is taken")


def model_id(graphs: tuple[Graph, ...], files: Mapping[str, FileEntry]) -> str:
    """Return the SHA-256 over the hashes of every file in a folder with a graph, weights beside it included."""
    folders = {PurePosixPath(graph.path).parent for graph in graphs}
    digest = hashlib.sha256()
    for name in sorted(files):
        if PurePosixPath(name).parent in folders:
            digest.update(f"{files[name].sha256}  {name}\n".encode())
    return digest.hexdigest()
