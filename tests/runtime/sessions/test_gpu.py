"""What is asked of CUDA and TensorRT: names that their Python packages have, versions, refusals in one sentence."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime import system_files
from sonoedge.runtime.sessions import gpu
from sonoedge.runtime.sessions.device import Cudart, Device
from sonoedge.runtime.sessions.engine_step import Context, LoadedEngine, TensorRt
from sonoedge.runtime.sessions.gpu import find_gpu, free_bytes, load_cudart, newest_ptx


def names(protocol: type) -> set[str]:
    """What a protocol asks for."""
    return {name for name in {*vars(protocol), *protocol.__annotations__} if not name.startswith("_")}


def test_tensorrt_has_every_name_that_is_used(fake: Any) -> None:
    """TensorRT for RTX has the names of TensorRT, and can be installed anywhere."""
    trt = pytest.importorskip("tensorrt_rtx", reason="waits for tensorrt-rtx: pip install 'sonoedge[rtx]'")
    for protocol, owner in ((TensorRt, trt), (LoadedEngine, trt.ICudaEngine), (Context, trt.IExecutionContext)):
        assert names(protocol)
        assert {name for name in names(protocol) if not hasattr(owner, name)} == set()
    for owner, name in (
        (trt.Runtime, "deserialize_cuda_engine"),
        (trt.Logger, "ERROR"),
        (trt.TensorIOMode, "INPUT"),
        (trt.ExecutionContextAllocationStrategy, "USER_MANAGED"),
        (trt.DynamicShapesKernelSpecializationStrategy, "EAGER"),
        (trt.IRuntimeConfig, "set_execution_context_allocation_strategy"),
        (trt.IRuntimeConfig, "dynamic_shapes_kernel_specialization_strategy"),
    ):
        assert hasattr(owner, name), name
    assert isinstance(trt.__version__, str)


@pytest.mark.parametrize(("protocol", "real"), [(LoadedEngine, "ICudaEngine"), (Context, "IExecutionContext")])
def test_tensorrt_calls_pass_as_many_arguments_as_it_takes(protocol: type, real: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="waits for tensorrt-rtx: pip install 'sonoedge[rtx]'")
    owner = getattr(trt, real)
    for name in names(protocol):
        ours = vars(protocol).get(name)
        if ours is None:  # a property
            continue
        wanted = len(inspect.signature(ours).parameters)
        signatures = re.findall(rf"^(?:\d+\. )?{name}\((self: .*)\) ->", getattr(owner, name).__doc__, re.MULTILINE)
        assert wanted in {1 + len(re.findall(r", \w+: ", signature)) for signature in signatures}, name


def test_cuda_python_has_every_name_that_is_used() -> None:
    """Both major versions that are served, 12 and 13, have them; here is one of them."""
    reason = "waits for cuda-python: pip install cuda-python"
    cudart = pytest.importorskip("cuda.bindings.runtime", reason=reason)
    for name in names(Cudart):
        assert hasattr(cudart, name), name
        if name in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaStreamNonBlocking"):
            continue
        ours = list(inspect.signature(vars(Cudart)[name]).parameters)[1:]
        theirs = re.match(rf"{name}\((.*?)\)", getattr(cudart, name).__doc__)
        assert theirs is not None, name
        takes = [part for part in theirs[1].split(",") if part.strip()]
        assert len(takes) == len(ours), (name, theirs[1])
    for owner, name in (
        (cudart.cudaMemcpyKind, "cudaMemcpyHostToDevice"),
        (cudart.cudaMemcpyKind, "cudaMemcpyDeviceToHost"),
        (cudart.cudaMemcpyKind, "cudaMemcpyDeviceToDevice"),
        (cudart.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal"),
        (cudart.cudaDeviceProp, "integrated"),
        (cudart.cudaDeviceProp, "totalGlobalMem"),
    ):
        assert hasattr(owner, name), name


def test_the_fakes_have_no_name_that_the_real_ones_lack(fake: Any) -> None:
    """With the tests above: every call that the sessions' tests see exists."""
    for protocol, made in ((Cudart, fake.Cuda), (LoadedEngine, fake.Engine), (Context, fake.Context)):
        instance = {"num_io_tensors", "num_optimization_profiles", "device_memory_size_v2"}
        assert names(protocol) <= set(dir(made)) | instance
    assert {name for name in dir(fake.Context) if not name.startswith("_")} == names(Context)
    assert {name for name in dir(fake.Cuda) if name.startswith("cuda")} == names(Cudart)


@pytest.mark.parametrize(
    ("cuda", "ptx"),
    [("12.0", 80), ("12.4", 84), ("12.5", 85), ("12.6", 85), ("12.7", 86), ("12.9", 88), ("13.0", 90), ("13.2", 92)],
)
def test_the_newest_ptx_of_a_driver(cuda: str, ptx: int) -> None:
    assert newest_ptx(cuda) == ptx


def test_a_driver_older_than_any_that_is_served() -> None:
    with pytest.raises(
        SonoEdgeError, match=r"runs CUDA 11\.8 at most and 12\.0 is the oldest served: update the driver"
    ):
        newest_ptx("11.8")


NVRM = "NVRM version: NVIDIA UNIX {}  540.4.0  Release Build  (builder@host)\nGCC version: 11\n"


def test_a_gpu_is_described(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_DRIVER_FILE", tmp_path / "version")
    found = find_gpu(fake.Cuda(sm=110))
    assert (found.name, found.sm, found.cuda, found.driver) == ("Fake GPU", 110, "13.2", "CUDA 13.2")
    for kind in ("x86_64 Kernel Module", "Open Kernel Module for aarch64"):
        (tmp_path / "version").write_text(NVRM.format(kind))
        assert find_gpu(fake.Cuda()).driver == "540.4.0"


def test_no_driver_and_no_gpu_are_told(fake: Any) -> None:
    with pytest.raises(SonoEdgeError, match="no NVIDIA driver is loaded"):
        find_gpu(fake.Cuda(version=0))
    cuda = fake.Cuda()
    cuda.devices = 0
    with pytest.raises(SonoEdgeError, match="shows no GPU: check CUDA_VISIBLE_DEVICES"):
        find_gpu(cuda)


def test_shared_memory_counts_what_can_be_reclaimed(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_files, "MEMORY_FILE", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  8000000 kB\nMemFree:  10 kB\nMemAvailable:  4000000 kB\n")
    cuda = fake.Cuda(free=10_000)
    own = find_gpu(cuda)
    assert free_bytes(cuda, own) == 10_000
    shared = type(own)(own.name, own.sm, own.memory_bytes, True, own.cuda, own.driver)
    assert free_bytes(cuda, shared) == 4_000_000 * 1024


def test_cuda_python_that_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SonoEdgeError, match=r"cuda-python is not installed: pip install 'sonoedge\[jetson\]'"):
        load_cudart()


def test_work_that_fails_while_it_is_captured_leaves_the_stream_usable(fake: Any) -> None:
    cuda = fake.Cuda()
    device = Device(cuda)

    def fail() -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011  # the work's own error comes through
        device.capture(fail)
    assert not cuda.capturing
    device.synchronize()


@pytest.mark.gpu
def test_memory_and_captured_work_on_a_real_gpu() -> None:
    """Copies there and back, zeroed memory, rows between pitches, and the same again as a CUDA graph."""
    cudart = pytest.importorskip("cuda.bindings.runtime", reason="waits for cuda-python: pip install cuda-python")
    if cudart.cudaGetDeviceCount()[1] in (None, 0):
        pytest.skip("no CUDA GPU here")
    device = Device(cudart)
    there, back = device.pinned(12, np.int32), device.pinned(12, np.int32)
    first, second = device.allocate(48), device.allocate(48)

    def work() -> None:
        device.upload(first, there)
        device.copy_rows(second, 16, first + 4, 16, 8, 3)
        device.download(back, second)

    there[:] = range(12)
    work()
    device.synchronize()
    assert back.tolist() == [1, 2, 0, 0, 5, 6, 0, 0, 9, 10, 0, 0]
    captured = device.capture(work)
    there[:] = range(100, 112)
    device.launch(captured)
    device.synchronize()
    assert back.tolist() == [101, 102, 0, 0, 105, 106, 0, 0, 109, 110, 0, 0]
    device.close()
