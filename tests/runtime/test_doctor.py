"""What `sonoedge doctor` says of GPUs, on machines that have all of it, some of it and nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sonoedge.runtime import gpu_findings
from sonoedge.runtime.gpu_findings import Finding
from sonoedge.runtime.sessions import gpu

LIBRARIES = ("cuda", "cuda.bindings", "cuda.bindings.runtime", "tensorrt", "tensorrt_rtx", "triton")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    """Findings of a machine with these modules: `machine(tensorrt=module, cudart=cudart, board="…")`."""

    def look(
        *, cudart: Any = None, board: str = "", files: tuple[Path, ...] = (), **modules: Any
    ) -> dict[str, Finding]:
        found = dict.fromkeys(LIBRARIES) | modules
        if cudart is not None:
            bindings = types.SimpleNamespace(__version__="12.9.10", runtime=cudart)
            found |= {"cuda": types.SimpleNamespace(bindings=bindings), "cuda.bindings": bindings}
            found |= {"cuda.bindings.runtime": cudart}
        for name, module in found.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(importlib.util, "find_spec", found.get)
        (tmp_path / "model").write_text(board)
        monkeypatch.setattr(gpu_findings, "_BOARD_FILE", tmp_path / "model")
        monkeypatch.setattr(gpu_findings, "_DEVICE_FILES", files)
        monkeypatch.setattr(gpu, "_DRIVER_FILE", tmp_path / "none")
        return {finding.name: finding for finding in gpu_findings.gpu_findings()}

    return look


class Cudart:
    """A GPU with 8 GiB that it shares."""

    def __init__(self, version: int = 13020) -> None:
        self._version = version

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return 0, self._version

    def cudaGetDeviceCount(self) -> tuple[int, int]:
        return 0, 1

    def cudaGetDeviceProperties(self, device: int) -> tuple[int, Any]:
        return 0, types.SimpleNamespace(name=b"Orin", major=8, minor=7, totalGlobalMem=2**33, integrated=1)


def test_a_machine_with_nothing_is_told_how_to_get_it(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine()
    assert {finding.ok for finding in found.values()} == {False}
    assert found["GPU"].value == "none from NVIDIA"
    for name, way in (
        ("cuda-python", "pip install 'sonoedge[jetson]'"),
        ("TensorRT", "apt-get install python3-libnvinfer"),
        ("TensorRT for RTX", "pip install 'sonoedge[rtx]'"),
        ("Triton", "pip install 'sonoedge[export]'"),
    ):
        assert found[name].value == "not installed"
        assert way in found[name].meaning
    assert all(finding.meaning.endswith(".") for finding in found.values())


def test_a_jetson_with_all_of_it(machine: Callable[..., dict[str, Finding]]) -> None:
    tensorrt = types.SimpleNamespace(__version__="10.16.2", QuickPluginCreationRequest=None)
    found = machine(cudart=Cudart(), board="NVIDIA Jetson Orin Nano Developer Kit Super\0", tensorrt=tensorrt)
    assert found["GPU"].value == (
        "NVIDIA Jetson Orin Nano Developer Kit Super (SM 87, 8.0 GiB shared with the processor), driver CUDA 13.2, "
        "CUDA up to 13.2"
    )
    assert "PTX up to 9.2" in found["GPU"].meaning
    assert (found["TensorRT"].value, found["cuda-python"].value) == ("10.16.2", "12.9.10")
    plugins = found["Plugins compiled ahead of time"]
    assert (plugins.value, plugins.ok) == ("yes", True)


def test_jetpack_6_has_no_such_plugins(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine(cudart=Cudart(12060), tensorrt=types.SimpleNamespace(__version__="10.3.0"))
    assert "PTX up to 8.5" in found["GPU"].meaning
    assert not found["Plugins compiled ahead of time"].ok
    assert "function of standard operators" in found["Plugins compiled ahead of time"].meaning


def test_a_gpu_that_cannot_be_asked(machine: Callable[..., dict[str, Finding]], tmp_path: Path) -> None:
    found = machine(files=(tmp_path,))
    assert (found["GPU"].value, found["GPU"].ok) == ("NVIDIA", False)
    assert "cuda-python is not installed: pip install 'sonoedge[jetson]'" in found["GPU"].meaning
    old = machine(cudart=Cudart(11080))
    assert not old["GPU"].ok
    assert "update the driver" in old["GPU"].meaning


def test_a_library_that_is_broken_is_said_to_be(
    machine: Callable[..., dict[str, Finding]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Any:
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    found = machine(tensorrt=types.SimpleNamespace())
    assert found["TensorRT"].value == "not usable (libnvinfer.so.10: cannot open shared object file)"


def test_every_name_is_in_the_json(sonoedge: Any) -> None:
    findings = json.loads(sonoedge("doctor", "--json").last_line)["findings"]
    names = [finding["name"] for finding in findings]
    assert len(names) == len(set(names))
    assert {"GPU", "cuda-python", "TensorRT", "TensorRT for RTX", "Triton", "ONNX Runtime"} <= set(names)
