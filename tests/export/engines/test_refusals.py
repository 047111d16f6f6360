"""What `sonoedge engine` refuses before it starts, and what a run that is ended leaves behind."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from sonoedge.bundle import Bundle, StageCost
from sonoedge.device_profiles import load_profile
from sonoedge.engine_manifest import EngineSet, Golden, engines_folder
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines import engine, golden, here, make_set, room
from sonoedge.export.engines.builder import Target
from sonoedge.export.engines.device import device_of
from sonoedge.export.engines.here import Here, look_here, readable_ptx
from sonoedge.export.engines.library import Abilities, Library
from sonoedge.export.engines.room import BUILDER_BYTES, Need, check_room, estimate
from sonoedge.export.engines.stages import plan_stages
from sonoedge.runtime.sessions.gpu import Gpu
from sonoedge.runtime.system_files import memory_bytes

PROFILE = "rtx-sm86"
RTX, JETSON = device_of(load_profile(PROFILE)), device_of(load_profile("jetson-orin-nano-8gb"))
IN_PLACE = Abilities(plugins=False, cache_in_place=True, decode_rows=2)

MakeBundle = Callable[..., Bundle]


def test_a_profile_without_engines_is_refused(make_bundle: MakeBundle) -> None:
    with pytest.raises(SonoEdgeError, match="profile cpu-x86-64 needs no engines, ONNX Runtime serves it"):
        engine.run(make_bundle().root, None, False, as_json=True)  # the bundle's own


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="is not a bundle"):
        engine.run(tmp_path, PROFILE, False, as_json=True)


def test_an_older_bundle_is_refused(make_bundle: MakeBundle, target: Target) -> None:
    with pytest.raises(SonoEdgeError, match="no vision graph in the formulation trt: build the bundle again"):
        engine.run(make_bundle(formulations=("qdq",)).root, PROFILE, False, as_json=True)


@pytest.mark.parametrize(
    ("memory", "free", "message"),
    [
        (0, 1 << 40, r"building needs 0.5 GB of memory and 0.0 GB are available: end other programs"),
        (1 << 40, 1000, r"the engines need 0.0 GB and the disk of .* has 0.0 GB free: free space"),
    ],
)
def test_too_little_room_is_refused_before_anything_is_built(
    memory: int,
    free: int,
    message: str,
    make_bundle: MakeBundle,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = make_bundle()
    monkeypatch.setattr(room, "memory_bytes", lambda _key: memory)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=free))
    with pytest.raises(SonoEdgeError, match=message):
        engine.run(bundle.root, PROFILE, False, as_json=True)
    assert not (bundle.root / "engines").exists()


def test_what_a_build_needs_follows_the_weights(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(stages={"vision": StageCost(bytes=10_000)})
    plan = plan_stages(bundle, RTX.buckets, IN_PLACE)
    stored = sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.endswith(".weights"))
    need = estimate(bundle, plan, streamed=True)
    assert need.memory_bytes == 2 * (stored - 10_000) + BUILDER_BYTES
    assert estimate(bundle, plan, streamed=False).memory_bytes == 3 * (stored - 10_000) + BUILDER_BYTES
    assert need.disk_bytes > stored
    check_room(bundle, Need(1, 1))
    assert (memory_bytes("MemAvailable") or 1) > 0


# The GPU of this machine.


def gpu(sm: int, cuda: str = "13.2") -> Gpu:
    return Gpu("Orin", sm, 8 << 30, True, cuda, "540.4.0")


def library(name: str = "tensorrt") -> Library:
    return Library(name, "10.16.2", JETSON.software[0], None)  # type: ignore[arg-type]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Callable[[Gpu], None]:
    """Let this machine have a GPU."""

    def have(this: Gpu) -> None:
        monkeypatch.setattr(here, "load_cudart", lambda: None)
        monkeypatch.setattr(here, "find_gpu", lambda _cudart: this)

    return have


def test_tensorrt_builds_on_the_device_only(found: Callable[[Gpu], None]) -> None:
    found(gpu(90))
    with pytest.raises(SonoEdgeError) as refused:
        look_here(JETSON, library())
    assert str(refused.value) == (
        "TensorRT 10.16.2 builds for the GPU that it runs on, and this machine has Orin (sm_90) and "
        "jetson-orin-nano-8gb is sm_87: run `sonoedge engine` on the device"
    )
    assert look_here(JETSON, library("tensorrt_rtx")).gpu is None
    found(gpu(87))
    assert look_here(JETSON, library()).gpu == gpu(87)


def test_the_older_of_driver_and_profile_says_which_ptx_is_read() -> None:
    assert readable_ptx(library(), gpu(87)) == JETSON.software[0].ptx_version == 92
    assert readable_ptx(library(), gpu(87, "12.6")) == 85


def test_kernels_for_another_device_are_refused_before_any_is_registered(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Index:
        def check_target(self, sm: int, ptx_version: int) -> None:
            raise SonoEdgeError(f"no kernels for sm_{sm} with PTX up to {ptx_version}")

    monkeypatch.setattr(make_set, "read_index", lambda _folder: Index())
    described = make_bundle()
    manifest = msgspec.structs.replace(described.manifest, kernels="golden/inputs.npz")
    with pytest.raises(SonoEdgeError, match="no kernels for sm_87 with PTX up to 85"):
        make_set._register(Bundle(described.root, manifest), library(), Here(gpu(87, "12.6")), 87)


def test_engines_that_give_other_outputs_are_told_to_be_wrong(
    make_bundle: MakeBundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed: list[bool] = []

    class Session:
        def __init__(self, *_arguments: object) -> None:
            pass

        def close(self) -> None:
            closed.append(True)

    def differ(_bundle: Bundle, _session: object) -> float:
        raise SonoEdgeError("0.npz: outputs differ by 0.7")

    monkeypatch.setattr("sonoedge.runtime.sessions.tensorrt.TensorRtSession", Session)
    monkeypatch.setattr("sonoedge.runtime.sessions.gpu.load_cudart", lambda: None)
    monkeypatch.setattr("sonoedge.runtime.golden.check_session", differ)
    bundle = make_bundle()
    engines = EngineSet(
        profile=PROFILE,
        sm=86,
        builder="tensorrt_rtx",
        builder_version="1.7",
        driver=None,
        model="",
        experts="none",
        kernels=None,
        engines=(),
        golden=Golden("not run"),
    )
    with pytest.raises(
        SonoEdgeError, match=r"the engines for rtx-sm86 are wrong and were removed: 0\.npz: outputs differ"
    ):
        golden.check_engines(bundle, tmp_path, engines, library())
    assert closed == [True]
    monkeypatch.setattr("sonoedge.runtime.golden.check_session", lambda _bundle, _session: 0.5)
    assert golden.check_engines(bundle, tmp_path, engines, library()) == 0.5


# Runs that are ended.

RUN = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from sonoedge.export.engines import engine, monitor

real = monitor.Phases.step
def step(self, name, number):  # long enough for the test to end the run in the midst of it
    print("building", flush=True)
    time.sleep(0.02)
    return real(self, name, number)
monitor.Phases.step = step
engine.run(Path(sys.argv[1]), "rtx-sm86", False, as_json=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_the_old_set(how: signal.Signals, make_bundle: MakeBundle, target: Target) -> None:
    bundle = make_bundle()
    place = engines_folder(bundle.root, PROFILE)
    place.mkdir(parents=True)
    (place / "engines.json").write_text("the old set")
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(bundle.root)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        for _ in range(5):
            assert running.stdout.readline() == "building\n"
        running.send_signal(how)
        running.communicate(timeout=60)
    assert running.returncode != 0
    assert [path.name for path in place.iterdir()] == ["engines.json"]
    assert (place / "engines.json").read_text() == "the old set"
    engine.run(bundle.root, PROFILE, False, as_json=True)
    assert {path.name for path in place.parent.iterdir()} == {PROFILE}
    assert json.loads((place / "engines.json").read_text())["profile"] == PROFILE
