"""Starts a compiled kernel through the CUDA driver as TensorRT's plugin contract says, to compare it with the oracle.

Parameters: addresses of the inputs, int32 scalars, addresses of the outputs, nothing else. TensorRT's own launch cannot
be run without its libraries; this one differs in nothing that the kernel sees. Source: NVIDIA, CUDA Driver API.
"""

import ctypes
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins.artifact import Artifact
from sonoedge.export.plugins.dispatch import Experts, Kernel, Tile, grid
from sonoedge.export.plugins.ptx import read_entry

_DRIVER = "libcuda.so.1"
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_PTX_TYPES = {"i32": "u32"}  # an address is u64

AnyArray = npt.NDArray[Any]


class Launch(msgspec.Struct, frozen=True):
    """How many blocks of how many threads, and the shared memory that a block asks for."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_memory_bytes: int


class Output(msgspec.Struct, frozen=True):
    """An array that a kernel fills."""

    shape: tuple[int, ...]
    dtype: str  # NumPy's name


def check_contract(artifact: Artifact, ptx: str) -> None:
    """Raise SonoEdgeError naming the first thing in which the PTX differs from what its artifact says."""
    entry = read_entry(ptx)
    found = (
        ("entry", entry.name, artifact.entry),
        ("SM", entry.sm, artifact.sm),
        ("PTX version", entry.version, artifact.ptx),
        ("threads of a block", entry.threads, artifact.threads),
        (
            "parameters",
            [parameter.type for parameter in entry.parameters],
            [_PTX_TYPES.get(parameter.type, "u64") for parameter in artifact.parameters],
        ),
    )
    for what, is_, said in found:
        if is_ != said:
            raise SonoEdgeError(f"{artifact.file}: {what} is {is_} and the index says {said}: build the bundle again")


def planned_launch(artifact: Artifact, kernel: Kernel, experts: Experts, tile: Tile, tokens: int) -> Launch:
    """Return the launch that the plugin asks TensorRT for."""
    return Launch(
        grid=grid(kernel.operator, experts, tile, tokens),
        block=(artifact.threads, 1, 1),
        shared_memory_bytes=artifact.shared_memory_bytes,
    )


class Gpu:
    """The first CUDA GPU; a context manager, whose memory is freed when it closes."""

    def __init__(self) -> None:
        """Raise SonoEdgeError when there is no driver or no GPU."""
        try:
            self._cuda = ctypes.CDLL(_DRIVER)
        except OSError as error:
            raise SonoEdgeError(f"{_DRIVER} cannot be loaded ({error}): install NVIDIA's driver") from error
        self._call("cuInit", 0)
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._device = device
        major, minor = (self._attribute(which) for which in (_MAJOR, _MINOR))
        self.sm = 10 * major + minor

    def __enter__(self) -> "Gpu":
        """Make the GPU's primary context this thread's."""
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the context go."""
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def run(
        self,
        artifact: Artifact,
        ptx: str,
        launch: Launch,
        inputs: Sequence[AnyArray],
        scalars: Sequence[int],
        outputs: Sequence[Output],
    ) -> list[AnyArray]:
        """Start the kernel once on copies of `inputs` and return what it wrote; every output byte starts as 0xFF.

        Raises SonoEdgeError for another number of arguments than the kernel has parameters, and for a failed call.
        """
        check_contract(artifact, ptx)
        given = len(inputs) + len(scalars) + len(outputs)
        if given != len(artifact.parameters):
            raise SonoEdgeError(
                f"{artifact.name} has {len(artifact.parameters)} parameters and got {given}: give them all"
            )
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ptx.encode() + b"\0")
        held: list[ctypes.c_uint64] = []
        try:
            self._call("cuModuleGetFunction", ctypes.byref(function), module, artifact.entry.encode())
            self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, launch.shared_memory_bytes)
            results = [np.empty(output.shape, output.dtype) for output in outputs]
            for array in results:
                array.view(np.uint8).fill(0xFF)
            held = [self._upload(array) for array in (*inputs, *results)]
            values: list[Any] = [*held[: len(inputs)], *map(ctypes.c_int32, scalars), *held[len(inputs) :]]
            pointers = (ctypes.c_void_p * given)(*(ctypes.addressof(value) for value in values))
            shape = (*launch.grid, *launch.block, launch.shared_memory_bytes)
            self._call("cuLaunchKernel", function, *map(ctypes.c_uint, shape), None, pointers, None)
            self._call("cuCtxSynchronize")
            for array, address in zip(results, held[len(inputs) :], strict=True):
                self._call(
                    "cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), address, ctypes.c_size_t(array.nbytes)
                )
        finally:
            for address in held:
                self._call("cuMemFree_v2", address)
            self._call("cuModuleUnload", module)
        return results

    def _upload(self, array: AnyArray) -> ctypes.c_uint64:
        """Return the address of a copy on the GPU."""
        address, whole = ctypes.c_uint64(), np.ascontiguousarray(array)
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(whole.nbytes, 1)))
        self._call("cuMemcpyHtoD_v2", address, ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(whole.nbytes))
        return address

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            said = (text.value or b"unknown error").decode()
            raise SonoEdgeError(f"{name} failed with {status} ({said}): see what NVIDIA's driver says of this GPU")
