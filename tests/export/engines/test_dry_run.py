"""`sonoedge engine --dry-run`: what would be built for any device, on a host that has neither its GPU nor TensorRT."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sonoedge.bundle import Bundle
from sonoedge.device_profiles import list_profiles
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines import dry_run, engine
from sonoedge.export.plugins.report import KernelRow

MakeBundle = Callable[..., Bundle]
ROW = KernelRow(name="expert_up-n64k64", sm=87, ptx=85, registers=99, spills=0, shared_memory_bytes=12288)
WITH_ENGINES = [profile.id for profile in list_profiles() if profile.gpu is not None]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that nobody had to compile: `tests/export/plugins` compiles them."""
    monkeypatch.setattr(dry_run, "compile_for", lambda _experts, _profile: [])
    monkeypatch.setattr(dry_run, "rows", lambda _artifacts: [ROW])


@pytest.mark.parametrize("profile", WITH_ENGINES)
def test_every_device_can_be_planned_for(
    profile: str, make_bundle: MakeBundle, compiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle()
    engine.run(bundle.root, profile, True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["profile"] == profile
    assert told["kernels"] == [
        {"name": ROW.name, "sm": 87, "ptx": 85, "registers": 99, "spills": 0, "shared_memory_bytes": 12288}
    ]
    assert [e["stage"] for e in told["engines"]] == ["vision", "decoder"]
    assert [e["graph"] for e in told["engines"]] == ["graphs/vision.trt.onnx", "graphs/decoder.trt.onnx"]
    rows = 2 if told["builder"] == "tensorrt_rtx" else 1
    assert told["engines"][1]["buckets"][-1] == {"rows": rows, "seen": 96, "images": rows, "logits": rows}
    assert told["memory_bytes"] > 0
    assert not (bundle.root / "engines").exists()


def test_it_reads_well(make_bundle: MakeBundle, compiled: None, capsys: pytest.CaptureFixture[str]) -> None:
    engine.run(make_bundle().root, "jetson-orin-nano-8gb", True, as_json=False)
    first, *table, vision, decoder, experts, needs = capsys.readouterr().out.splitlines()
    assert first == "jetson-orin-nano-8gb (sm_87), TensorRT 10.16.2: nothing is built"
    assert "registers" in table[0]
    assert table[1].split()[:4] == ["expert_up-n64k64", "8.5", "99", "0"]
    assert vision == "vision from graphs/vision.trt.onnx: pictures of up to 64 patches"
    assert decoder == "decoder from graphs/decoder.trt.onnx: passes of up to 1, 32 or 96 tokens that read up to 96"
    assert experts == "experts: the portable function of standard operators"
    assert needs.startswith("needs up to ")


def test_a_dense_model_has_no_kernels(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    engine.run(make_bundle(experts=None).root, "jetson-orin-nano-8gb", True, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["kernels"] == []
    assert told["experts"] == "none"


def test_without_triton_the_way_out_is_told(make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(dry_run, "compile_for", missing)
    with pytest.raises(SonoEdgeError, match=r"the bundle has no kernels for sm_87 and triton, .* is not installed"):
        engine.run(make_bundle().root, "jetson-orin-nano-8gb", True, as_json=True)


def test_neither_the_build_host_nor_a_builder_is_needed(
    make_bundle: MakeBundle, compiled: None, tmp_path: Path
) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        assert sys.modules.get(name) is None or name == "tensorrt_rtx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", None)
        patch.setitem(sys.modules, "tensorrt_rtx", None)
        engine.run(make_bundle().root, "rtx-sm120", True, as_json=True)
