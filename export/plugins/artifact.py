"""What `kernels/kernels.json` of a bundle says: every compiled kernel of the plugins, and how it is launched."""

import hashlib
from pathlib import Path

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins.dispatch import Activation, Experts, Kernel, Tile

KERNELS_FOLDER = "kernels"
INDEX_FILE = "kernels.json"
FORMAT_VERSION = 1
WARP_THREADS = 32


class Parameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One parameter of a kernel; `type` as Triton spells it: "*fp16" is an address of float16, "i32" a number."""

    name: str
    type: str


class Artifact(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One compiled kernel; its parameters are the inputs, the scalar and the outputs of the operator, in this order."""

    name: str
    operator: str
    constants: dict[str, int]  # compiled in: the node's sizes and the tile's
    entry: str
    sm: int
    ptx: int  # PTX version without the point: 85 is 8.5
    num_warps: int
    num_stages: int
    shared_memory_bytes: int  # a block asks for at launch
    registers: int  # of 32 bits, a thread
    spills: int  # bytes that a thread stores for want of registers, plus bytes that it loads again
    parameters: tuple[Parameter, ...]
    file: str  # beside the index
    sha256: str

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.num_warps * WARP_THREADS


class KernelIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All kernels of a bundle, made for one model's experts."""

    format_version: int = FORMAT_VERSION
    activation: Activation
    experts: Experts
    artifacts: tuple[Artifact, ...]

    def check_target(self, sm: int, ptx_version: int) -> None:
        """Raise SonoEdgeError unless there are kernels for an SM, of a PTX version that is not over the driver's."""
        if not any(artifact.sm == sm and artifact.ptx <= ptx_version for artifact in self.artifacts):
            made = sorted({f"sm_{artifact.sm} with PTX {artifact.ptx / 10}" for artifact in self.artifacts})
            raise SonoEdgeError(
                f"the bundle's kernels are for {', '.join(made) or 'no device'}, and this is sm_{sm} with PTX up to "
                f"{ptx_version / 10}: build the bundle for this device's profile"
            )

    def find(self, kernel: Kernel, experts: Experts, tile: Tile, sm: int, ptx_version: int) -> Artifact:
        """Return the kernel for a tile, an SM and the newest PTX version that is not over a driver's.

        Raises SonoEdgeError when there is none.
        """
        wanted = (kernel.operator, kernel.values(experts, tile), tile.num_warps, tile.num_stages, sm)
        usable = [
            artifact
            for artifact in self.artifacts
            if (artifact.operator, artifact.constants, artifact.num_warps, artifact.num_stages, artifact.sm) == wanted
            and artifact.ptx <= ptx_version
        ]
        if not usable:
            raise SonoEdgeError(
                f"the bundle has no kernel {kernel.operator} {tile.name} with {wanted[1]} for sm_{sm} and PTX up to "
                f"{ptx_version / 10}: build the bundle for this device's profile and its buckets"
            )
        return max(usable, key=lambda artifact: artifact.ptx)


def read_index(folder: Path) -> KernelIndex:
    """Read the index of a bundle's folder of kernels; raises SonoEdgeError for a damaged one or another version's."""
    path = folder / INDEX_FILE
    try:
        index = msgspec.json.decode(path.read_bytes(), type=KernelIndex)
    except OSError as error:
        raise SonoEdgeError(f"{path} cannot be read ({error.strerror}): build the bundle again") from error
    except msgspec.DecodeError as error:
        raise SonoEdgeError(f"{path} is damaged ({error}): build the bundle again") from error
    if index.format_version != FORMAT_VERSION:
        raise SonoEdgeError(
            f"{path} has format_version {index.format_version} and this SonoEdge reads {FORMAT_VERSION}: "
            "build the bundle again"
        )
    return index


def read_ptx(folder: Path, artifact: Artifact) -> str:
    """Return a kernel's PTX; raises SonoEdgeError when the file is not what was written."""
    path = folder / artifact.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SonoEdgeError(f"{path} cannot be read ({error.strerror}): copy the bundle again") from error
    if hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise SonoEdgeError(f"{path} has changed since it was written (SHA-256 differs): copy the bundle again")
    return data.decode()


def encode_index(index: KernelIndex) -> bytes:
    """Return `kernels.json` as it is written, indented so that a person can read it."""
    return msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n"
