"""Small graphs really built by TensorRT-RTX: what comes out, what is refused, and what ends a build."""

import errno
import hashlib
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import onnx
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines import builder
from sonoedge.export.engines.buckets import Extent
from sonoedge.export.engines.builder import Target, build_engine
from sonoedge.export.engines.library import Library
from sonoedge.export.engines.log import Record
from sonoedge.export.engines.monitor import Phases
from sonoedge.export.engines.timing import open_timing_cache, save_timing_cache


def rows(least: int, most: int) -> dict[str, Extent]:
    return {"x": Extent((least, 128), (most, 128))}


def test_a_graph_becomes_a_plan_with_its_products_as_asked(
    target: Target, three_products: Path, tmp_path: Path
) -> None:
    built = build_engine(target, three_products, tmp_path / "three.plan", [rows(32, 32), rows(4, 24)])
    data = (tmp_path / "three.plan").read_bytes()
    assert built.path == tmp_path / "three.plan"
    assert (built.bytes, built.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(data) > 256 * 128 + 96 * 256 + 4 * 64 * 96  # the weights, which were in a file beside the graph
    assert msgspec.to_builtins(built.products) == {
        "int8": 1,
        "int8_weights": 1,
        "float": 1,
        "not_int8": (),
        "unpacked": (),
    }
    assert built.layers >= 4
    assert built.workspace_bytes is not None
    assert built.workspace_bytes > 0
    assert [path.name for path in tmp_path.iterdir()] == ["three.plan"]  # TensorRT-RTX keeps no timing cache


def test_a_library_that_writes_plans_whole_gives_the_same(target: Target, three_products: Path, tmp_path: Path) -> None:
    class Whole:
        def __init__(self, module: Any) -> None:
            self._module = module
            self.Builder = lambda logger: _WholeBuilder(module.Builder(logger))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._module, name)

    class _WholeBuilder:
        def __init__(self, own: Any) -> None:
            self._own = own

        def __getattr__(self, name: str) -> Any:
            if name == "build_serialized_network_to_stream":
                raise AttributeError(name)
            return getattr(self._own, name)

    library = msgspec.structs.replace(target.library, module=Whole(target.library.module))
    assert target.library.streams
    assert not library.streams
    whole = build_engine(msgspec.structs.replace(target, library=library), three_products, tmp_path / "a", [rows(8, 8)])
    piecewise = build_engine(target, three_products, tmp_path / "b", [rows(8, 8)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert whole.sha256 == piecewise.sha256


def test_an_operator_that_is_unknown_is_told_by_its_name(target: Target, three_products: Path, tmp_path: Path) -> None:
    model = onnx.load(three_products)
    model.graph.node[-1].op_type = "Nonsense"
    onnx.save(model, tmp_path / "wrong.onnx")
    with pytest.raises(SonoEdgeError) as refused:
        build_engine(target, tmp_path / "wrong.onnx", tmp_path / "wrong.plan", [rows(8, 8)])
    message = str(refused.value)
    assert message.startswith(f"{target.library} cannot build wrong.onnx for sm_86 (node c (Nonsense): ")
    assert message.endswith("build the bundle again with this SonoEdge, or report it")
    assert "\n" not in message


def test_a_graph_whose_weights_are_gone_is_refused(target: Target, three_products: Path, tmp_path: Path) -> None:
    (tmp_path / "alone.onnx").write_bytes(three_products.read_bytes())
    with pytest.raises(SonoEdgeError, match=r"cannot build alone.onnx for sm_86 \(.*import initializer"):
        build_engine(target, tmp_path / "alone.onnx", tmp_path / "alone.plan", [rows(8, 8)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="waits for a system with /dev/full")
def test_a_full_disk_ends_the_build(target: Target, three_products: Path) -> None:
    with pytest.raises(OSError, match="No space") as full:
        build_engine(target, three_products, Path("/dev/full"), [rows(8, 8)])
    assert full.value.errno == errno.ENOSPC


def test_ctrl_c_ends_the_build_and_its_thread(
    target: Target, three_products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()
    real = Phases.step

    def step(self: Phases, name: str, number: int) -> bool:
        if not started.is_set():
            started.set()
            os.kill(os.getpid(), signal.SIGINT)
            while not self.stopped:
                pass
        return real(self, name, number)

    monkeypatch.setattr(Phases, "step", step)
    with pytest.raises(KeyboardInterrupt):
        build_engine(target, three_products, tmp_path / "three.plan", [rows(8, 8)])
    assert started.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine-build"]


def test_an_error_inside_the_thread_is_raised_outside() -> None:
    def fail() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        builder._in_thread(fail, Phases(lambda steps=1, note="": None))


def test_progress_never_goes_back_and_ends_at_the_whole() -> None:
    shown: list[float] = []
    phases = Phases(lambda steps=1, note="": shown.append(steps))
    phases.start("all", 2)
    phases.start("first", 4)
    for step in range(4):
        assert phases.step("first", step)
    phases.finish("first")
    assert phases.step("all", 0)
    phases.start("second", 1)
    phases.start("inside", 2)
    phases.step("inside", 0)
    phases.step("unheard of", 7)
    phases.finish("inside")
    phases.step("second", 0)
    phases.finish("second")
    phases.step("all", 1)
    phases.finish("all")
    assert all(steps > 0 for steps in shown)
    assert sum(shown) == pytest.approx(1)
    phases.stopped = True
    assert phases.step("all", 0) is False


def test_a_record_keeps_what_is_of_use_and_little_of_it() -> None:
    record = Record()
    for number in range(100):
        record.take("ERROR", f"error {number}\n  told on two lines")
    record.take("INFO", "Total Activation Memory: 8290304 bytes")
    record.take("INFO", "Total Activation Memory: 8193536")
    record.take("VERBOSE", "Layers:\nName: a, LayerType: gemm, Inputs: []")
    assert record.errors[0] == "error 0 told on two lines"
    assert len(record.errors) < 100
    assert record.activation_bytes == [8290304, 8193536]
    assert record.layers.startswith("Name: a")
    assert Record().errors == []


class FakeConfig:
    """A build's settings, which take caches of one GPU only."""

    def __init__(self) -> None:
        self.used: bytes | None = None

    def create_timing_cache(self, content: bytes) -> Any:
        return None if content == b"damaged" else SimpleNamespace(content=content, serialize=lambda: content + b"+")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content == b"another GPU":
            return False
        self.used = cache.content
        return True


@pytest.mark.parametrize(
    ("kept", "used"), [(None, b""), (b"timings", b"timings"), (b"another GPU", b""), (b"damaged", b"")]
)
def test_timings_are_used_again_where_they_fit(kept: bytes | None, used: bytes, target: Target, tmp_path: Path) -> None:
    path, config = tmp_path / "timing.cache", FakeConfig()
    full = Library("tensorrt", "10.16.2", target.library.software, SimpleNamespace())
    if kept is not None:
        path.write_bytes(kept)
    cache = open_timing_cache(full, config, path)
    assert config.used == used
    save_timing_cache(cache, path)
    assert path.read_bytes() == used + b"+"
    assert open_timing_cache(target.library, config, path) is None  # TensorRT-RTX measures nothing when it builds
