"""Which backend serves a bundle, and every way in which engines do not fit it or this machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.bundle import Bundle, Contents, open_bundle
from sonoedge.bundle_writer import BundleWriter
from sonoedge.engine_manifest import Bucket, Engine, EngineSet, Golden
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime import model as models
from sonoedge.runtime.sessions import ort, ort_cuda, tensorrt
from sonoedge.runtime.sessions.choose import Backend, open_session, unchecked_engines

JETSON = "jetson-orin-nano-8gb"
PLANS = {"vision": b"a vision plan", "decoder": b"a decoder plan"}


@pytest.fixture
def make_bundle(tmp_path: Path, contents: Contents) -> Callable[..., Bundle]:
    """A bundle whose graphs no session can load, for a profile: `make_bundle("rtx-sm86")`."""

    def make(profile: str = JETSON) -> Bundle:
        with BundleWriter(tmp_path / profile) as writer:
            for name in ("graphs/vision.onnx", "graphs/decoder.onnx", "golden/0.npz"):
                writer.add(name).write_bytes(name.encode())
            writer.commit(msgspec.structs.replace(contents, profile=profile))
        return open_bundle(tmp_path / profile)

    return make


def write_engines(bundle: Bundle, profile: str = JETSON, **changes: Any) -> EngineSet:
    """Engines as `sonoedge engine` leaves them."""
    folder = bundle.root / "engines" / profile
    folder.mkdir(parents=True)
    engines = []
    for stage, data in PLANS.items():
        (folder / f"{stage}.plan").write_bytes(data)
        engines.append(
            Engine(
                stage=stage,  # type: ignore[arg-type]
                path=f"{stage}.plan",
                sha256=hashlib.sha256(data).hexdigest(),
                bytes=len(data),
                buckets=(Bucket(rows=4, seen=64, images=4, logits=4),),
                cache_in_place=True,
                workspace_bytes=None,
            )
        )
    whole: dict[str, Any] = {
        "profile": profile,
        "sm": 87,
        "builder": "tensorrt",
        "builder_version": "10.16.2",
        "driver": "CUDA 13.2",
        "model": bundle.manifest.model.id,
        "experts": "none",
        "kernels": None,
        "engines": tuple(engines),
        "golden": Golden("not run"),
    }
    made = EngineSet(**(whole | changes))
    (folder / "engines.json").write_bytes(msgspec.json.encode(made))
    return made


@pytest.fixture
def device(fake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine with a GPU and TensorRT; gives what sessions were opened on."""
    cuda = fake.Cuda()
    opened: list[Any] = []
    monkeypatch.setattr("sonoedge.runtime.sessions.gpu._DRIVER_FILE", tmp_path / "none")
    monkeypatch.setattr(tensorrt, "load_cudart", lambda: cuda)
    monkeypatch.setattr(tensorrt, "load_tensorrt", lambda builder: fake.TensorRt(cuda, {}))

    def open_folder(folder: Path, *rest: Any) -> str:
        opened.append(folder)
        return "a session"

    monkeypatch.setattr(tensorrt, "TensorRtSession", open_folder)
    cuda.opened = opened
    return cuda


@pytest.mark.parametrize(
    ("backend", "profile", "served_by"),
    [
        (None, "cpu-x86-64", "cpu"),
        (None, JETSON, "tensorrt"),
        ("cpu", JETSON, "cpu"),
        ("cuda", JETSON, "cuda"),
        ("tensorrt", "cpu-x86-64", "tensorrt"),
    ],
)
def test_what_was_asked_for_serves_or_what_the_profile_names(
    make_bundle: Callable[..., Bundle],
    monkeypatch: pytest.MonkeyPatch,
    backend: Backend | None,
    profile: str,
    served_by: str,
) -> None:
    for name, module in (("cpu", ort), ("cuda", ort_cuda), ("tensorrt", tensorrt)):
        monkeypatch.setattr(module, "open_session", lambda bundle, name=name: name)
    assert open_session(make_bundle(profile), backend) == served_by  # type: ignore[comparison-overlap]


def test_a_profile_of_the_users_own_needs_a_word(make_bundle: Callable[..., Bundle]) -> None:
    with pytest.raises(
        SonoEdgeError, match="profile my-cart, which is none of this SonoEdge's: say --backend tensorrt"
    ):
        open_session(make_bundle("my-cart"))


def test_without_engines_both_ways_out_are_told(make_bundle: Callable[..., Bundle]) -> None:
    """Told before a GPU is looked for: there is none here."""
    bundle = make_bundle()
    with pytest.raises(
        SonoEdgeError, match=r"has no engines: run `sonoedge engine .*` on the device, .* `--backend cpu`"
    ):
        open_session(bundle)
    (bundle.root / "engines" / ".jetson-orin-nano-8gb.partial").mkdir(parents=True)
    (bundle.root / "engines" / ".jetson-orin-nano-8gb.partial" / "engines.json").write_text("{}")
    with pytest.raises(SonoEdgeError, match="has no engines"):
        open_session(bundle)


def test_engines_that_fit_are_opened(make_bundle: Callable[..., Bundle], device: Any) -> None:
    bundle = make_bundle()
    write_engines(bundle)
    assert open_session(bundle) == "a session"  # type: ignore[comparison-overlap]
    assert device.opened == [bundle.root / "engines" / JETSON]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "f" * 64}, r"made for model f{64} and this is model [0-9a-f]{64}: run `sonoedge engine .*` again"),
        (
            {"builder_version": "10.3.0"},
            r"made for tensorrt 10\.3\.0 and this is tensorrt 10\.16\.2: run `sonoedge engine",
        ),
        ({"driver": "540.4.0"}, r"made for driver 540\.4\.0 and this is driver CUDA 13\.2: run `sonoedge engine"),
        ({"sm": 110}, r"engines for jetson-orin-nano-8gb \(SM 110\) and this GPU, Fake GPU, is SM 87: run `sonoedge"),
        ({"engines": ()}, "has no vision engine: run `sonoedge engine"),
    ],
    ids=["model", "TensorRT", "driver", "SM", "stages"],
)
def test_engines_made_for_something_else_are_refused(
    make_bundle: Callable[..., Bundle], device: Any, changes: dict[str, Any], message: str
) -> None:
    bundle = make_bundle()
    write_engines(bundle, **changes)
    with pytest.raises(SonoEdgeError, match=message) as refused:
        open_session(bundle)
    assert str(refused.value).count(". ") == 0
    assert device.opened == []
    assert device.allocations == 0


def test_engines_made_without_a_driver_fit_every_driver(make_bundle: Callable[..., Bundle], device: Any) -> None:
    bundle = make_bundle()
    write_engines(bundle, driver=None)
    assert open_session(bundle) == "a session"  # type: ignore[comparison-overlap]


def test_a_changed_a_missing_and_an_outside_plan_are_refused(make_bundle: Callable[..., Bundle], device: Any) -> None:
    bundle = make_bundle()
    made = write_engines(bundle)
    plan = bundle.root / "engines" / JETSON / "decoder.plan"
    plan.write_bytes(b"another plan...")
    with pytest.raises(SonoEdgeError, match=r"decoder\.plan has changed since it was made \(SHA-256 differs\): run"):
        open_session(bundle)
    plan.unlink()
    with pytest.raises(SonoEdgeError, match=r"decoder\.plan is missing: run `sonoedge engine"):
        open_session(bundle)
    outside = [msgspec.structs.replace(engine, path="../../tokenizer.json") for engine in made.engines]
    (plan.parent / "engines.json").write_bytes(
        msgspec.json.encode(msgspec.structs.replace(made, engines=tuple(outside)))
    )
    with pytest.raises(SonoEdgeError, match="is not a plain path inside the bundle"):
        open_session(bundle)
    assert device.opened == []


def test_too_little_memory_is_told_before_anything_is_loaded(make_bundle: Callable[..., Bundle], device: Any) -> None:
    bundle = make_bundle()
    write_engines(bundle)
    device.free = 100
    with pytest.raises(SonoEdgeError, match=r"GPU memory .* and 0\.00 GB are free: end other programs, or build"):
        open_session(bundle)
    assert device.opened == []


def test_the_set_for_this_gpu_is_taken(make_bundle: Callable[..., Bundle], device: Any) -> None:
    bundle = make_bundle("cpu-x86-64")
    write_engines(bundle, "rtx-sm86", sm=86)
    write_engines(bundle, JETSON)
    open_session(bundle, "tensorrt")
    assert device.opened == [bundle.root / "engines" / JETSON]
    write_engines(bundle, "jetson-agx-orin-64gb")
    with pytest.raises(
        SonoEdgeError, match="has engines of jetson-agx-orin-64gb and jetson-orin-nano-8gb for this GPU"
    ):
        open_session(bundle, "tensorrt")
    own = make_bundle("jetson-agx-orin-64gb")
    write_engines(own, JETSON)
    write_engines(own, "jetson-agx-orin-64gb")
    open_session(own)
    assert device.opened[-1] == own.root / "engines" / "jetson-agx-orin-64gb"


def test_the_way_out_names_a_profile_that_is_not_the_bundles(make_bundle: Callable[..., Bundle], device: Any) -> None:
    bundle = make_bundle("cpu-x86-64")
    write_engines(bundle, JETSON, model="0")
    with pytest.raises(SonoEdgeError, match=rf"run `sonoedge engine {bundle.root} --profile {JETSON}` again"):
        open_session(bundle, "tensorrt")


@pytest.mark.parametrize("builder", ["tensorrt", "tensorrt_rtx"])
def test_a_library_that_is_missing_is_told(builder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, builder, None)
    way = re.escape("python3-libnvinfer" if builder == "tensorrt" else "pip install 'sonoedge[rtx]'")
    with pytest.raises(SonoEdgeError, match=rf"{builder} cannot be imported .*, which the engines need: .*{way}"):
        tensorrt.load_tensorrt(builder)


def test_a_machine_without_a_gpu_says_so(make_bundle: Callable[..., Bundle], device: Any) -> None:
    bundle = make_bundle()
    write_engines(bundle)
    device.version = 0
    with pytest.raises(SonoEdgeError, match="no NVIDIA driver is loaded"):
        open_session(bundle)


def test_a_first_start_says_that_engines_are_checked(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = ort.open_session(open_bundle(tiny.bundle), threads=1)
    monkeypatch.setattr(models, "open_session", lambda bundle, backend: inner)
    monkeypatch.setattr(models, "unchecked_engines", lambda session: JETSON)
    models.open_model(tiny.bundle)
    said = capsys.readouterr()
    assert said.out == ""
    first, second = said.err.splitlines()
    assert first.startswith(f"no device has checked the engines of {JETSON} yet: repeating the recorded outputs")
    assert second.startswith("largest difference 0.")


def test_only_engines_that_no_device_ran_are_unchecked(make_bundle: Callable[..., Bundle]) -> None:
    session = tensorrt.TensorRtSession.__new__(tensorrt.TensorRtSession)
    session.engines = write_engines(make_bundle())
    assert unchecked_engines(session) == JETSON
    session.engines = msgspec.structs.replace(session.engines, golden=Golden("passed", 0.01))
    assert unchecked_engines(session) is None
