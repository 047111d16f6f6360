"""A GPU and a TensorRT made of NumPy: memory with borders, a stream that waits, engines that are Python functions.

They refuse what the real ones would break at: reads outside an allocation, a capture of what was never run, shapes that
a profile does not have. Device memory is not zero at first, and nothing happens before a stream is waited for.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.engine_manifest import Bucket

Arrays = Mapping[str, npt.NDArray[Any]]
Runner = Callable[[Arrays], Arrays]
Shape = tuple[int, ...]

OUT_OF_MEMORY = 2


class FakeCuda:
    """What SonoEdge uses of `cuda.bindings.runtime`, on host memory."""

    cudaMemcpyKind = types.SimpleNamespace(
        cudaMemcpyHostToDevice="HD", cudaMemcpyDeviceToHost="DH", cudaMemcpyDeviceToDevice="DD"
    )
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")
    cudaStreamNonBlocking = 1
    stream = 77

    def __init__(self, *, sm: int = 87, free: int = 2**30, version: int = 13020) -> None:
        self.sm, self.free, self.version = sm, free, version
        self.devices = 1
        self.launches = 0
        self.graphs = 0  # alive
        self._memory: dict[int, tuple[npt.NDArray[np.uint8], str]] = {}
        self._queue: list[Callable[[], None]] = []
        self._capturing: list[Callable[[], None]] | None = None

    # What the tests ask.

    @property
    def allocations(self) -> int:
        """Blocks that nobody has freed."""
        return len(self._memory)

    @property
    def capturing(self) -> bool:
        return self._capturing is not None

    def at(self, address: int, size: int, kind: str) -> npt.NDArray[np.uint8]:
        """The bytes at an address, all of them inside one allocation of this kind."""
        for start, (block, block_kind) in self._memory.items():
            if start <= address < start + len(block):
                assert address + size <= start + len(block), "past the end of an allocation"
                assert block_kind == kind, f"a {block_kind} address used as {kind}"
                return block[address - start : address - start + size]
        raise AssertionError(f"nothing is allocated at {address}")

    def put(self, work: Callable[[], None]) -> None:
        """Work for the stream: done when it is waited for, or recorded."""
        (self._queue if self._capturing is None else self._capturing).append(work)

    # What SonoEdge calls.

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, self.devices

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        assert device == 0
        major, minor = divmod(self.sm, 10)
        return 0, types.SimpleNamespace(name=b"Fake GPU", major=major, minor=minor, totalGlobalMem=2**33, integrated=0)

    def cudaGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"out of memory" if error == OUT_OF_MEMORY else b"unknown"

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return 0, self.free, 2**33

    def _new(self, size: int, kind: str) -> tuple[int, int | None]:
        assert not self.capturing, "memory asked for while capturing"
        if kind == "device" and size > self.free:
            return OUT_OF_MEMORY, None
        block = np.full(size, 0xFF, np.uint8)  # NaN in every float type
        self._memory[block.ctypes.data] = (block, kind)
        return 0, block.ctypes.data

    def cudaMalloc(self, size: int) -> tuple[int, int | None]:
        return self._new(size, "device")

    def cudaMallocHost(self, size: int) -> tuple[int, int | None]:
        return self._new(size, "host")

    def cudaFree(self, devPtr: int) -> tuple[int]:
        assert self._memory.pop(devPtr)[1] == "device"
        return (0,)

    def cudaFreeHost(self, ptr: int) -> tuple[int]:
        assert self._memory.pop(ptr)[1] == "host"
        return (0,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[int]:
        assert stream == self.stream
        self.put(lambda: self.at(devPtr, count, "device").fill(value))
        return (0,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: str, stream: int) -> tuple[int]:
        assert stream == self.stream
        names = {"H": "host", "D": "device"}

        def copy() -> None:
            self.at(dst, count, names[kind[1]])[:] = self.at(src, count, names[kind[0]])

        self.put(copy)
        return (0,)

    def cudaMemcpy2DAsync(
        self, dst: int, dpitch: int, src: int, spitch: int, width: int, height: int, kind: str, stream: int
    ) -> tuple[int]:
        assert stream == self.stream
        assert kind == "DD"
        assert width <= min(dpitch, spitch)

        def copy() -> None:
            for row in range(height):
                source = self.at(src + row * spitch, width, "device")
                self.at(dst + row * dpitch, width, "device")[:] = source

        self.put(copy)
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        assert flags == self.cudaStreamNonBlocking
        return 0, self.stream

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        assert not self.capturing, "waited while capturing"
        while self._queue:
            self._queue.pop(0)()
        return (0,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:
        assert not self._queue
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> tuple[int]:
        assert mode == "thread"
        assert not self.capturing
        self._capturing = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, list[Callable[[], None]] | None]:
        recorded, self._capturing = self._capturing, None
        self.graphs += 1
        return 0, recorded

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[int, Any]:
        self.graphs += 1
        return 0, tuple(graph)

    def cudaGraphDestroy(self, graph: list[Callable[[], None]]) -> tuple[int]:
        self.graphs -= 1
        return (0,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[int]:
        self.graphs -= 1
        return (0,)

    def cudaGraphLaunch(self, graphExec: Any, stream: int) -> tuple[int]:
        self.launches += 1
        for work in graphExec:
            self.put(work)
        return (0,)


class Plan(msgspec.Struct):
    """A fake engine: what a plan file holds."""

    inputs: dict[str, npt.DTypeLike]
    outputs: dict[str, npt.DTypeLike]
    profiles: list[dict[str, tuple[Shape, Shape]]]  # input → least and largest shape
    output_shapes: Callable[[Mapping[str, Shape]], Mapping[str, Shape]]
    run: Runner
    scratch: int = 512
    runs: int = 0


class FakeContext:
    """What SonoEdge uses of `IExecutionContext`, with its rules."""

    def __init__(self, trt: FakeTensorRt, plan: Plan) -> None:
        self._trt, self._plan = trt, plan
        self._profile: dict[str, tuple[Shape, Shape]] | None = None
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._settled = False  # whether it has run with these shapes
        self._scratch = False

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == FakeCuda.stream
        self._profile = self._plan.profiles[profile_index]
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._plan.scratch
        self._trt.cuda.at(memory, size, "device")
        self._scratch = True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        assert self._profile is not None
        if name not in self._profile:
            return False
        least, most = self._profile[name]
        if len(shape) != len(most) or any(not a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            return False
        self._settled = self._settled and self._shapes[name] == shape
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self._plan.inputs or name in self._plan.outputs
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> Shape:
        if name in self._shapes:
            return self._shapes[name]
        return self._plan.output_shapes(self._shapes)[name]

    def is_stream_capturable(self, stream: int) -> bool:
        return self._trt.capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == FakeCuda.stream
        assert self._scratch, "no device memory to work in"
        assert set(self._shapes) == set(self._plan.inputs), "a shape is missing"
        assert set(self._addresses) == set(self._plan.inputs) | set(self._plan.outputs), "an address is missing"
        assert self._settled or not self._trt.cuda.capturing, "captured before it ran once"
        self._settled = True
        shapes, addresses = dict(self._shapes), dict(self._addresses)  # what a capture keeps
        shapes |= self._plan.output_shapes(shapes)
        types_ = {**self._plan.inputs, **self._plan.outputs}

        def view(name: str) -> npt.NDArray[Any]:
            dtype = np.dtype(types_[name])
            size = int(np.prod(shapes[name])) * dtype.itemsize
            return self._trt.cuda.at(addresses[name], size, "device").view(dtype).reshape(shapes[name])

        def run() -> None:
            self._plan.runs += 1
            found = self._plan.run({name: view(name) for name in self._plan.inputs})
            for name in self._plan.outputs:
                past = name.replace("present_", "past_")
                if name.startswith("present_") and found[name] is not None and shapes[name] == shapes[past]:
                    assert addresses[name] == addresses[past], "a cache in place is one buffer"
                view(name)[...] = found[name]

        self._trt.cuda.put(run)
        return True


class FakeTensorRt:
    """What SonoEdge uses of the module `tensorrt`; plan files hold the names of `plans`."""

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None: ...

    TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
    ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="ours")
    DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")

    def __init__(self, cuda: FakeCuda, plans: Mapping[str, Plan], version: str = "10.16.2") -> None:
        self.__version__ = version
        self.cuda, self.plans = cuda, plans
        self.capturable = True

    def Runtime(self, logger: Any) -> Any:
        def deserialize(data: Any) -> Any:
            plan = self.plans.get(bytes(data).decode())
            return None if plan is None else FakeEngine(self, plan)

        return types.SimpleNamespace(deserialize_cuda_engine=deserialize)

    def nptype(self, trt_type: Any) -> Any:
        return trt_type


class FakeEngine:
    """What SonoEdge uses of `ICudaEngine`."""

    def __init__(self, trt: FakeTensorRt, plan: Plan) -> None:
        self._trt, self._plan = trt, plan
        self._names = [*plan.inputs, *plan.outputs]
        self.num_io_tensors = len(self._names)
        self.num_optimization_profiles = len(plan.profiles)
        self.device_memory_size_v2 = plan.scratch

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self._plan.inputs else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return self._plan.inputs.get(name) or self._plan.outputs[name]

    def get_tensor_shape(self, name: str) -> Shape:
        shapes = {shape for profile in self._plan.profiles for shape in profile[name]}
        return shapes.pop() if len(shapes) == 1 else (-1,) * len(min(shapes))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        least, most = self._plan.profiles[profile_index][name]
        return [least, most, most]

    def create_runtime_config(self) -> Any:
        config = types.SimpleNamespace(strategy=None)
        config.set_execution_context_allocation_strategy = lambda strategy: setattr(config, "strategy", strategy)
        return config

    def create_execution_context(self, how: Any) -> FakeContext:
        assert how == "ours" or (
            how.strategy == "ours" and how.dynamic_shapes_kernel_specialization_strategy == "eager"
        )
        return FakeContext(self._trt, self._plan)


def decoder_plan(run: Runner, sizes: Any, buckets: Sequence[Bucket], *, in_place: bool, capacity: int | None) -> Plan:
    """A fake decoder engine: `sizes` is a DecoderSpec, `run` computes; float16 and in place, or float32 and grown."""
    kind = np.float16 if in_place else np.float32
    names = [f"{part}_{layer}" for layer in range(sizes.layers) for part in ("key", "value")]

    def shapes(bucket: Bucket) -> dict[str, tuple[Shape, Shape]]:
        past = (1, sizes.kv_heads, capacity if in_place else bucket.seen - bucket.rows, sizes.head_dim)
        every: dict[str, Any] = {
            "input_ids": (1, bucket.rows),
            "positions": (3, 1, bucket.rows),
            "image_embeds": (bucket.images, sizes.hidden),
            "attention_bias": (1, 1, bucket.rows, bucket.seen),
            "logits_rows": (bucket.logits,),
            **({"write_at": (1,)} if in_place else {}),
            **{f"past_{name}": past for name in names},
        }
        return {name: (shape, shape) for name, shape in every.items()}

    def output_shapes(given: Mapping[str, Shape]) -> dict[str, Shape]:
        _, heads, past, width = given["past_key_0"]
        present = (1, heads, past if in_place else past + given["input_ids"][1], width)
        return {"logits": (*given["logits_rows"], sizes.vocab), **{f"present_{name}": present for name in names}}

    whole = dict.fromkeys(("input_ids", "positions", "logits_rows"), np.int64)
    return Plan(
        inputs={
            **whole,
            "image_embeds": np.float32,
            "attention_bias": kind,
            **({"write_at": np.int64} if in_place else {}),
            **{f"past_{name}": kind for name in names},
        },
        outputs={"logits": np.float32, **{f"present_{name}": kind for name in names}},
        profiles=[shapes(bucket) for bucket in buckets],
        output_shapes=output_shapes,
        run=run,
    )


def vision_plan(run: Runner, hidden: int, buckets: Sequence[Bucket], values: int = 1176) -> Plan:
    """A fake vision engine, each profile from the next smaller bucket to its own."""
    least = [4, *(bucket.rows + 4 for bucket in buckets)]
    return Plan(
        inputs={"patches": np.float32, "places": np.int64},
        outputs={"image_embeds": np.float32},
        profiles=[
            {"patches": ((low, values), (bucket.rows, values)), "places": ((low, 2), (bucket.rows, 2))}
            for low, bucket in zip(least[:-1], buckets, strict=True)
        ],
        output_shapes=lambda given: {"image_embeds": (given["patches"][0] // 4, hidden)},
        run=run,
    )


@pytest.fixture(scope="session")
def fake() -> types.SimpleNamespace:
    """The fakes' classes and makers: this folder's tests cannot import one another."""
    return types.SimpleNamespace(
        Cuda=FakeCuda,
        TensorRt=FakeTensorRt,
        Engine=FakeEngine,
        Context=FakeContext,
        Plan=Plan,
        decoder_plan=decoder_plan,
        vision_plan=vision_plan,
    )
