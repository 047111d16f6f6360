"""Whether this machine has the memory and the disk that a build takes, looked at before it starts."""

import shutil
from pathlib import PurePosixPath

import msgspec

from sonoedge.bundle import GRAPHS_FOLDER, Bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.stages import Plan, Stage
from sonoedge.runtime.system_files import memory_bytes

# Of one engine's weights: what the builder lays out anew, and the plan on its way to the disk, whole in a library that
# cannot write it piece by piece. The file that they come from is mapped, and makes room when it must.
COPIES_STREAMED = 2
COPIES_WHOLE = 3
BUILDER_BYTES = 512 * 2**20  # the library itself, and what it takes for a graph without weights
KERNEL_BYTES = 4 * 2**20  # of a plan beside the weights, for each layer of the model and optimization profile


class Need(msgspec.Struct, frozen=True):
    """What a build takes at most."""

    memory_bytes: int
    disk_bytes: int


def estimate(bundle: Bundle, plan: Plan, *, streamed: bool) -> Need:
    """Reckon from the weights of each engine; engines are built one after another, and all of them are kept."""
    sizes = [_weights_bytes(bundle, stage) for stage in plan.stages]
    copies = COPIES_STREAMED if streamed else COPIES_WHOLE
    profiles = sum(len(stage.buckets) for stage in plan.stages)
    kernels = KERNEL_BYTES * bundle.manifest.decoder.layers * profiles
    return Need(memory_bytes=copies * max(sizes) + BUILDER_BYTES, disk_bytes=sum(sizes) + kernels)


def check_room(bundle: Bundle, need: Need) -> None:
    """Raise SonoEdgeError when the memory or the disk of this machine is too small."""
    free = memory_bytes("MemAvailable")
    if free is not None and free < need.memory_bytes:
        raise SonoEdgeError(
            f"building needs {_gb(need.memory_bytes)} of memory and {_gb(free)} are available: end other programs, or "
            "build the bundle with a smaller student"
        )
    room = shutil.disk_usage(bundle.root).free
    if room < need.disk_bytes:
        raise SonoEdgeError(
            f"the engines need {_gb(need.disk_bytes)} and the disk of {bundle.root} has {_gb(room)} free: free space, "
            "or copy the bundle to a larger disk"
        )


def _weights_bytes(bundle: Bundle, stage: Stage) -> int:
    """Weights of a stage: as the build counted the vision tower's, the rest of the weights file for the others."""
    files = bundle.manifest.files
    inside = {name: entry.bytes for name, entry in files.items() if PurePosixPath(name).parent.name == GRAPHS_FOLDER}
    stored = sum(size for name, size in inside.items() if not name.endswith(".onnx"))
    cost = bundle.manifest.stages.get("vision")
    vision = cost.bytes if cost is not None and cost.bytes is not None else None
    if vision is None or vision > stored:
        return stored
    return vision if stage.name == "vision" else stored - vision


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
