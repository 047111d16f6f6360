"""Memory, a stream and captured work on one CUDA GPU, through cuda-python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from sonoedge.runtime.sessions.gpu import called

Answer = tuple[Any, ...]  # a status, then what was asked for


class Cudart(Protocol):
    """What is used of `cuda.bindings.runtime`; every call answers with a status first."""

    cudaMemcpyKind: Any  # noqa: N815
    cudaStreamCaptureMode: Any  # noqa: N815
    cudaStreamNonBlocking: int  # noqa: N815

    def cudaDriverGetVersion(self) -> Answer: ...  # noqa: N802  # CUDA's own names
    def cudaGetDeviceCount(self) -> Answer: ...  # noqa: N802
    def cudaGetDeviceProperties(self, device: int) -> Answer: ...  # noqa: N802
    def cudaGetErrorString(self, error: Any) -> Answer: ...  # noqa: N802
    def cudaMemGetInfo(self) -> Answer: ...  # noqa: N802
    def cudaMalloc(self, size: int) -> Answer: ...  # noqa: N802
    def cudaFree(self, devPtr: int) -> Answer: ...  # noqa: N802, N803
    def cudaMallocHost(self, size: int) -> Answer: ...  # noqa: N802
    def cudaFreeHost(self, ptr: int) -> Answer: ...  # noqa: N802
    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: Any) -> Answer: ...  # noqa: N802, N803
    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: Any) -> Answer: ...  # noqa: N802
    def cudaMemcpy2DAsync(  # noqa: N802
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: Any, stream: Any
    ) -> Answer: ...
    def cudaStreamCreateWithFlags(self, flags: int) -> Answer: ...  # noqa: N802
    def cudaStreamSynchronize(self, stream: Any) -> Answer: ...  # noqa: N802
    def cudaStreamDestroy(self, stream: Any) -> Answer: ...  # noqa: N802
    def cudaStreamBeginCapture(self, stream: Any, mode: Any) -> Answer: ...  # noqa: N802
    def cudaStreamEndCapture(self, stream: Any) -> Answer: ...  # noqa: N802
    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Answer: ...  # noqa: N802
    def cudaGraphLaunch(self, graphExec: Any, stream: Any) -> Answer: ...  # noqa: N802, N803
    def cudaGraphDestroy(self, graph: Any) -> Answer: ...  # noqa: N802
    def cudaGraphExecDestroy(self, graphExec: Any) -> Answer: ...  # noqa: N802, N803


class Device:
    """One stream of a GPU and the memory that was asked for; everything is freed together."""

    def __init__(self, cudart: Cudart) -> None:
        """Make the stream; raises SonoEdgeError, as every method does, with CUDA's own words when CUDA refuses."""
        self._cudart = cudart
        # The default stream waits for other streams, and cannot be captured.
        self._stream: Any = self._call(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self._pointers: list[int] = []
        self._pinned: list[int] = []
        self._captured: list[Any] = []

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return int(self._stream)

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new device memory, all zero."""
        pointer = int(self._call(self._cudart.cudaMalloc(max(size_bytes, 1))))
        self._pointers.append(pointer)
        self._call(self._cudart.cudaMemsetAsync(pointer, 0, size_bytes, self._stream))
        return pointer

    def pinned(self, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return a new array [size] in host memory that the GPU reads and writes while the processor goes on."""
        kind = np.dtype(dtype)
        size_bytes = max(size * kind.itemsize, 1)
        pointer = int(self._call(self._cudart.cudaMallocHost(size_bytes)))
        self._pinned.append(pointer)
        memory = memoryview((ctypes.c_uint8 * size_bytes).from_address(pointer)).cast("B")
        array: npt.NDArray[Any] = np.frombuffer(memory, kind, size)
        array[:] = 0
        return array

    def upload(self, pointer: int, array: npt.NDArray[Any]) -> None:
        """Copy a pinned array to the device, in the order of the stream."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cudart.cudaMemcpyAsync(pointer, array.ctypes.data, array.nbytes, kind, self._stream))

    def download(self, array: npt.NDArray[Any], pointer: int) -> None:
        """Copy from the device into a pinned array, in the order of the stream."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cudart.cudaMemcpyAsync(array.ctypes.data, pointer, array.nbytes, kind, self._stream))

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copy `rows` of `width` bytes each inside the device; a pitch is the bytes from one row to the next."""
        kind = self._cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self._cudart.cudaMemcpy2DAsync(to, to_pitch, source, source_pitch, width, rows, kind, self._stream))

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        self._call(self._cudart.cudaStreamSynchronize(self._stream))

    def capture(self, work: Callable[[], None]) -> Any:
        """Return what `work` puts into the stream, without running it, ready for `launch`."""
        mode = self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            work()
        finally:  # a stream left in capture would take no other work
            ended = self._cudart.cudaStreamEndCapture(self._stream)
        graph = self._call(ended)
        runnable = self._call(self._cudart.cudaGraphInstantiate(graph, 0))
        self._call(self._cudart.cudaGraphDestroy(graph))
        self._captured.append(runnable)
        return runnable

    def launch(self, captured: Any) -> None:
        """Put captured work into the stream."""
        self._call(self._cudart.cudaGraphLaunch(captured, self._stream))

    def close(self) -> None:
        """Free everything; arrays from `pinned` must not be touched any more."""
        self.synchronize()
        for captured in self._captured:
            self._call(self._cudart.cudaGraphExecDestroy(captured))
        for pointer in self._pointers:
            self._call(self._cudart.cudaFree(pointer))
        for pointer in self._pinned:
            self._call(self._cudart.cudaFreeHost(pointer))
        self._call(self._cudart.cudaStreamDestroy(self._stream))
        self._captured, self._pointers, self._pinned = [], [], []

    def _call(self, answer: Answer) -> Any:
        return called(self._cudart, answer)
