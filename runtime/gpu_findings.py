"""What `sonoedge doctor` finds of GPUs: the GPU and its driver, the libraries that build and run engines."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import msgspec

from sonoedge.engine_manifest import GET_BUILDER
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sessions.gpu import GET_CUDA_PYTHON, find_gpu, load_cudart, newest_ptx
from sonoedge.runtime.system_files import read_system_file

_BOARD_FILE = Path("/proc/device-tree/model")
_DEVICE_FILES = (Path("/dev/nvidia0"), Path("/dev/nvhost-gpu"), Path("/dev/nvgpu"))


class Finding(msgspec.Struct, frozen=True):
    """One thing looked at; `ok` is false when something is missing that a user may want."""

    name: str
    value: str
    ok: bool
    meaning: str


def gpu_findings() -> list[Finding]:
    """Look for a GPU and for what serves and builds on it; never fails, whatever is missing."""
    trt, tensorrt = _tensorrt()
    return [_gpu(), _cuda_python(), tensorrt, _plugins(trt), _tensorrt_rtx(), _triton()]


def _gpu() -> Finding:
    board = read_system_file(_BOARD_FILE).strip("\0\n")
    jetson = board if "jetson" in board.lower() else ""
    try:
        gpu = find_gpu(load_cudart())
    except SonoEdgeError as error:
        if not jetson and not any(path.exists() for path in _DEVICE_FILES):
            return Finding("GPU", "none from NVIDIA", False, "Bundles run on the CPU here.")
        return Finding("GPU", jetson or "NVIDIA", False, f"It cannot be asked what it is: {error}.")
    value = (
        f"{jetson or gpu.name} (SM {gpu.sm}, {gpu.memory_bytes / 2**30:.1f} GiB"
        f"{' shared with the processor' if gpu.shares_memory else ''}), driver {gpu.driver}, CUDA up to {gpu.cuda}"
    )
    try:
        ptx = newest_ptx(gpu.cuda) / 10
    except SonoEdgeError as error:
        return Finding("GPU", value, False, f"Bundles run on the CPU here: {error}.")
    meaning = f"Kernels must be for this SM, in PTX up to {ptx}; `sonoedge profiles` lists the devices to build for."
    return Finding("GPU", value, True, meaning)


def _cuda_python() -> Finding:
    module = _import("cuda.bindings")
    if isinstance(module, str):
        meaning = f"Engines cannot be run, nor the GPU asked what it is: {GET_CUDA_PYTHON}."
        return Finding("cuda-python", module, False, meaning)
    return Finding("cuda-python", str(module.__version__), True, "Sessions on TensorRT keep their memory through it.")


def _tensorrt() -> tuple[Any, Finding]:
    module = _import("tensorrt")
    if isinstance(module, str):
        meaning = f"Only needed for engines on a Jetson or a server's GPU: {GET_BUILDER['tensorrt']}."
        return None, Finding("TensorRT", module, False, meaning)
    return module, Finding("TensorRT", str(module.__version__), True, "Engines can be built and run on this machine.")


def _plugins(trt: Any) -> Finding:
    name = "Plugins compiled ahead of time"
    if trt is None:
        return Finding(name, "no TensorRT", False, "They come with TensorRT 10.9 and newer.")
    if not hasattr(
        trt, "QuickPluginCreationRequest"
    ):  # came with them; importing tensorrt.plugin to look prints a warning
        meaning = (
            "TensorRT 10.9 is the first that has them: here routed experts run as a function of standard operators."
        )
        return Finding(name, "not in this TensorRT", False, meaning)
    return Finding(name, "yes", True, "Routed experts run as the kernels that a bundle carries.")


def _tensorrt_rtx() -> Finding:
    name, module = "TensorRT for RTX", _import("tensorrt_rtx")
    if isinstance(module, str):
        meaning = f"Only needed for engines of RTX profiles: {GET_BUILDER['tensorrt_rtx']}."
        return Finding(name, module, False, meaning)
    return Finding(name, str(module.__version__), True, "Engines of RTX profiles can be built here, without a GPU too.")


def _triton() -> Finding:
    module = _import("triton")
    if isinstance(module, str):
        meaning = "Only needed where bundles with kernels are built: pip install 'sonoedge[export]'."
        return Finding("Triton", module, False, meaning)
    return Finding(
        "Triton", str(module.__version__), True, "Kernels can be compiled for every profile on this machine."
    )


def _import(name: str) -> Any:
    """The module, or in words why there is none."""
    try:
        if importlib.util.find_spec(name) is None:
            return "not installed"
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if name.startswith(str(error.name)) else f"not usable ({error})"
    except (ImportError, OSError, RuntimeError) as error:  # a library of its own that is missing, or no driver
        return f"not usable ({error})"
