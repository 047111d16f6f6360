"""Which builder is taken for a device, and what is refused in one sentence when there is none that fits."""

import re
import sys
from types import ModuleType, SimpleNamespace

import msgspec
import pytest

from sonoedge.device_profiles import list_profiles, load_profile
from sonoedge.device_profiles.schema import Software
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.device import Device, device_of
from sonoedge.export.engines.library import Abilities, find_library, promised_abilities

JETSON = device_of(load_profile("jetson-orin-nano-8gb"))
RTX = device_of(load_profile("rtx-sm86"))


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the machine has, the tests say what there is."""
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(sys, "meta_path", [_Nothing(name), *sys.meta_path])


class _Nothing:
    """Finds one module nowhere."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def install(monkeypatch: pytest.MonkeyPatch, name: str, version: str, **contents: object) -> None:
    module = ModuleType(name)
    module.__dict__.update(__version__=version, Builder=SimpleNamespace(), **contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_profiles_without_a_gpu_have_no_engines() -> None:
    for profile in list_profiles():
        if profile.gpu is None:
            with pytest.raises(SonoEdgeError, match=f"profile {profile.id} needs no engines, ONNX Runtime serves it"):
                device_of(profile)
        else:
            assert device_of(profile).software


@pytest.mark.parametrize(
    ("device", "way_out"),
    [(JETSON, "tensorrt is not installed: on a Jetson it comes with JetPack"), (RTX, "pip install 'sonoedge[rtx]'")],
)
def test_a_missing_builder_is_refused_with_how_to_get_it(device: Device, way_out: str) -> None:
    with pytest.raises(SonoEdgeError, match=rf"engines for {device.id} cannot be built here, .*{re.escape(way_out)}"):
        find_library(device)


@pytest.mark.parametrize(("version", "release"), [("10.16.2.10", "7.2"), ("10.16.0", "7.2"), ("10.3.0.30", "6.2.2")])
def test_the_release_of_the_software_follows_the_installed_version(
    version: str, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "tensorrt", version)
    library = find_library(JETSON)
    assert (library.name, library.version, library.software.version) == ("tensorrt", version, release)
    assert str(library) == f"TensorRT {version}"
    assert library.needs_gpu
    assert not library.streams
    assert library.abilities() == Abilities(
        plugins=False, cache_in_place=False, decode_rows=1
    )  # this stand-in has no such operators


def test_another_version_than_the_profile_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "10.9.0.34")
    with pytest.raises(SonoEdgeError) as refused:
        find_library(JETSON)
    assert str(refused.value).startswith(
        "TensorRT 10.9.0.34 is installed and profile jetson-orin-nano-8gb names TensorRT 10.16.2 (JetPack 7.2) or "
        "TensorRT 10.3 (JetPack 6.2.2): install that"
    )


def test_an_sm_that_the_builder_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = SimpleNamespace(__members__={"NONE": 0, "CURRENT": 1, "SM75": 75, "SM89": 89, "SM120": 120})
    install(monkeypatch, "tensorrt_rtx", RTX.software[0].builder_version, ComputeCapability=known)
    with pytest.raises(SonoEdgeError, match=r"rtx-sm86 has gpu.sm = 86, which TensorRT-RTX 1.7 does not build for"):
        find_library(RTX)
    assert find_library(msgspec.structs.replace(RTX, sm=89)).name == "tensorrt_rtx"


def test_a_library_that_cannot_be_loaded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [_Broken(), *sys.meta_path])
    with pytest.raises(
        SonoEdgeError, match=r"tensorrt is installed and cannot be loaded \(libnvinfer.so.10: cannot open"
    ):
        find_library(JETSON)


class _Broken:
    """A library whose own libraries are missing."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> None:
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.10: cannot open shared object file")


def software(builder: str, version: str, *, plugins: bool) -> Software:
    return msgspec.convert(
        {
            "name": "JetPack",
            "version": "7",
            "cuda": "13.2",
            "builder": builder,
            "builder_version": version,
            "ptx_version": 92,
            "ahead_of_time_plugins": plugins,
        },
        Software,
    )


@pytest.mark.parametrize(
    ("named", "plugins", "in_place"),
    [
        (software("tensorrt", "10.16.2", plugins=True), True, True),
        (software("tensorrt", "10.16.2", plugins=False), False, True),
        (software("tensorrt", "10.9", plugins=True), True, False),
        (software("tensorrt", "10.3", plugins=True), False, False),
        (software("tensorrt_rtx", "1.7", plugins=True), False, True),
    ],
)
def test_what_a_version_promises(named: Software, plugins: bool, in_place: bool) -> None:
    rows = 1 if named.builder == "tensorrt" else 2
    assert promised_abilities(named) == Abilities(plugins=plugins, cache_in_place=in_place, decode_rows=rows)


def test_a_builder_has_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", "10.16.2.10", IKVCacheUpdateLayer=object)
    assert find_library(JETSON).abilities() == Abilities(plugins=False, cache_in_place=True, decode_rows=1)
    install(monkeypatch, "tensorrt", "10.16.2.10", IKVCacheUpdateLayer=object, QuickPluginCreationRequest=object)
    assert find_library(JETSON).abilities() == Abilities(plugins=True, cache_in_place=True, decode_rows=1)
