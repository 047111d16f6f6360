"""One optimization profile of a TensorRT engine with buffers for its inputs and its answer."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.engine_manifest import Builder
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sessions.device import Device

Shape = tuple[int, ...]


class Context(Protocol):
    """What is used of TensorRT's `IExecutionContext`."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def get_tensor_shape(self, name: str) -> Any: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...
    def is_stream_capturable(self, stream: int) -> bool: ...  # TensorRT for RTX only


class LoadedEngine(Protocol):
    """What is used of TensorRT's `ICudaEngine`."""

    num_io_tensors: int
    num_optimization_profiles: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def get_tensor_shape(self, name: str) -> Any: ...
    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Any: ...
    def create_execution_context(self, how: Any) -> Context | None: ...
    def create_runtime_config(self) -> Any: ...


class TensorRt(Protocol):
    """What is used of the module `tensorrt`, or of `tensorrt_rtx`, which has the same names."""

    __version__: str
    Logger: Any
    TensorIOMode: Any
    ExecutionContextAllocationStrategy: Any
    DynamicShapesKernelSpecializationStrategy: Any  # TensorRT for RTX only

    def Runtime(self, logger: Any) -> Any: ...  # noqa: N802  # TensorRT's own name
    def nptype(self, trt_type: Any) -> Any: ...


class Tensor(msgspec.Struct, frozen=True):
    """An input or an output of an engine."""

    dtype: npt.DTypeLike
    is_input: bool


class PlanFile:
    """A plan file on the GPU."""

    def __init__(self, trt: TensorRt, builder: Builder, path: Path) -> None:
        """Load it; raises SonoEdgeError when this TensorRT refuses it."""
        self.name = path.name
        self._trt, self._rtx = trt, builder == "tensorrt_rtx"
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))  # an engine needs its runtime as long as it lives
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine: LoadedEngine | None = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise SonoEdgeError(
                f"{path.name}: {builder} {trt.__version__} cannot load it: run `sonoedge engine` on this bundle again"
            )
        self.engine = engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        self.tensors = {name: self._tensor(name) for name in names}

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a run needs beside weights, inputs and outputs."""
        return self.engine.device_memory_size_v2

    def largest_shape(self, name: str, profile: int) -> Shape:
        """The largest shape that an input may have in an optimization profile."""
        shape = tuple(self.engine.get_tensor_shape(name))
        return shape if -1 not in shape else tuple(self.engine.get_tensor_profile_shape(name, profile)[2])

    def context(self, profile: int, scratch: tuple[int, int], device: Device) -> Context:
        """Make a context for one optimization profile that works in `scratch` (address, bytes)."""
        by_us = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        how = by_us
        if self._rtx:  # it compiles kernels for the sizes at hand: before the first run is over, not behind a capture
            how = self.engine.create_runtime_config()
            how.set_execution_context_allocation_strategy(by_us)
            how.dynamic_shapes_kernel_specialization_strategy = (
                self._trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
        context = self.engine.create_execution_context(how)
        if context is None or not context.set_optimization_profile_async(profile, device.stream):
            raise SonoEdgeError(
                f"{self.name}: TensorRT cannot prepare optimization profile {profile}: free memory on the GPU, or run "
                "`sonoedge engine` on this bundle again"
            )
        context.set_device_memory(*scratch)
        return context

    def can_capture(self, context: Context, device: Device) -> bool:
        """Whether runs may be captured into a CUDA graph; only TensorRT for RTX has engines that may not."""
        return not self._rtx or context.is_stream_capturable(device.stream)

    def _tensor(self, name: str) -> Tensor:
        try:
            dtype = np.dtype(self._trt.nptype(self.engine.get_tensor_dtype(name)))
        except TypeError as error:
            raise SonoEdgeError(
                f"{self.name}: {name} has a type that NumPy lacks: run `sonoedge engine` on this bundle again"
            ) from error
        return Tensor(dtype, self.engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)


class EngineStep:
    """Runs one optimization profile: takes up inputs, gives one output; the KV cache lies elsewhere, only bound."""

    def __init__(
        self,
        plan: PlanFile,
        profile: int,
        device: Device,
        scratch: tuple[int, int],
        *,
        output: str,
        bound: Mapping[str, int],
        captured: bool = False,
    ) -> None:
        """`bound` gives the addresses of tensors that are not copied; `captured`: replay a CUDA graph after one run."""
        self._plan, self._device, self._output = plan, device, output
        self._context = plan.context(profile, scratch, device)
        self._shapes: dict[str, Shape] = {}
        self._host: dict[str, npt.NDArray[Any]] = {}
        self._pointer: dict[str, int] = dict(bound)
        for name, tensor in plan.tensors.items():
            if tensor.is_input:
                self._reshape(name, plan.largest_shape(name, profile))
        for name, tensor in plan.tensors.items():
            if name not in bound:
                shape = self._shapes[name] if tensor.is_input else tuple(self._context.get_tensor_shape(name))
                if -1 in shape:
                    raise SonoEdgeError(f"{plan.name}: the size of {name} is open: run `sonoedge engine` again")
                self._host[name] = device.pinned(int(np.prod(shape)), tensor.dtype)
                self._pointer[name] = device.allocate(self._host[name].nbytes)
            if not self._context.set_tensor_address(name, self._pointer[name]):
                raise SonoEdgeError(f"{plan.name}: TensorRT refuses an address for {name}: this is a defect, report it")
        self._captured = captured and plan.can_capture(self._context, device)
        self._graph: Any = None

    def run(self, inputs: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """Return a copy of the output. An input that is left out keeps what it held, zero at first."""
        for name, array in inputs.items():
            self._reshape(name, array.shape)
            self._host[name][: array.size] = array.ravel()
        shape = tuple(self._context.get_tensor_shape(self._output))
        answer = self._host[self._output][: int(np.prod(shape))]
        if self._graph is not None:
            self._device.launch(self._graph)
            self._device.synchronize()
        else:
            self._enqueue(inputs, answer)
            self._device.synchronize()
            if (
                self._captured
            ):  # the first run settles what TensorRT prepares for a shape, which a capture must not hold
                self._graph = self._device.capture(lambda: self._enqueue(inputs, answer))
        kept: npt.NDArray[Any] = answer.reshape(shape).copy()
        return kept

    def _enqueue(self, inputs: Mapping[str, npt.NDArray[Any]], answer: npt.NDArray[Any]) -> None:
        for name, array in inputs.items():
            self._device.upload(self._pointer[name], self._host[name][: array.size])
        if not self._context.execute_async_v3(self._device.stream):
            raise SonoEdgeError(f"{self._plan.name}: TensorRT cannot run it: `sonoedge doctor` says what is amiss here")
        self._device.download(answer, self._pointer[self._output])

    def _reshape(self, name: str, shape: Shape) -> None:
        if self._shapes.get(name) == shape:
            return
        if name not in self._plan.tensors or not self._context.set_input_shape(name, shape):
            raise SonoEdgeError(
                f"{self._plan.name} takes no {name} of shape {list(shape)}: run `sonoedge engine` on this bundle again"
            )
        self._shapes[name] = shape
