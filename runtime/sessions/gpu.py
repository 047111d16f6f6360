"""Which NVIDIA GPU this machine has and what its driver can do, asked through cuda-python."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.system_files import memory_bytes, read_system_file

if TYPE_CHECKING:
    from sonoedge.runtime.sessions.device import Cudart

GET_CUDA_PYTHON = "pip install 'sonoedge[jetson]' on a Jetson, 'sonoedge[gpu]' on another host with an NVIDIA GPU"
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


class Gpu(msgspec.Struct, frozen=True):
    """The first CUDA GPU; CUDA_VISIBLE_DEVICES says which is the first."""

    name: str
    sm: int  # compute capability without the point: 87 is 8.7
    memory_bytes: int
    shares_memory: bool  # with the processor, as on a Jetson
    cuda: str  # newest CUDA whose programs the driver runs: "13.2"
    driver: str  # the driver's own version, or of its CUDA where the system does not tell


def load_cudart() -> Cudart:
    """Return cuda-python's bindings of the CUDA runtime; raises SonoEdgeError when they are not installed."""
    try:
        runtime: Any = importlib.import_module("cuda.bindings.runtime")  # there from cuda-python 12.6.2 on, in 13 too
    except ImportError as error:
        raise SonoEdgeError(f"cuda-python is not installed: {GET_CUDA_PYTHON}; `--backend cpu` does without") from error
    bindings: Cudart = runtime
    return bindings


def find_gpu(cudart: Cudart) -> Gpu:
    """Describe the first GPU; raises SonoEdgeError when there is none or no driver for it."""
    version = int(called(cudart, cudart.cudaDriverGetVersion()))
    if not version:
        raise SonoEdgeError(
            "no NVIDIA driver is loaded: `sonoedge doctor` says what this machine has; `--backend cpu` needs none"
        )
    if int(called(cudart, cudart.cudaGetDeviceCount())) == 0:
        raise SonoEdgeError("the NVIDIA driver shows no GPU: check CUDA_VISIBLE_DEVICES")
    properties = called(cudart, cudart.cudaGetDeviceProperties(0))
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    return Gpu(
        name=properties.name.decode().strip("\0"),
        sm=10 * properties.major + properties.minor,
        memory_bytes=properties.totalGlobalMem,
        shares_memory=bool(properties.integrated),
        cuda=cuda,
        driver=_driver_version() or f"CUDA {cuda}",
    )


def free_bytes(cudart: Cudart, gpu: Gpu) -> int:
    """Memory that can be had now: what CUDA calls free and, where processor and GPU share it, what can be reclaimed."""
    status, free, _total = cudart.cudaMemGetInfo()
    called(cudart, (status,))
    reclaimable = memory_bytes("MemAvailable") if gpu.shares_memory else None
    return max(int(free), reclaimable or 0)


def newest_ptx(cuda: str) -> int:
    """Return the newest PTX version, without its point, that a driver for this CUDA reads: "12.6" gives 85.

    Source: the release history in NVIDIA's PTX ISA documentation; CUDA 12.6 came without a new PTX version.
    """
    major, minor = (int(part) for part in cuda.split(".")[:2])
    if major < 12:
        raise SonoEdgeError(f"the driver runs CUDA {cuda} at most and 12.0 is the oldest served: update the driver")
    return (major - 4) * 10 + minor - (1 if major == 12 and minor >= 6 else 0)


def called(cudart: Cudart, answer: tuple[Any, ...]) -> Any:
    """Return what a call gave behind its status; raises SonoEdgeError with CUDA's own words when the status is bad."""
    status, *values = answer
    if int(status) != 0:
        words = cudart.cudaGetErrorString(status)[1]
        text = words.decode() if isinstance(words, bytes) else str(words)
        raise SonoEdgeError(f"CUDA error {int(status)} ({text}): `sonoedge doctor` says what this machine has")
    return values[0] if values else None


def _driver_version() -> str | None:
    """The version of the loaded kernel driver, None where the system does not tell."""
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", read_system_file(_DRIVER_FILE))
    return found[1] if found else None
