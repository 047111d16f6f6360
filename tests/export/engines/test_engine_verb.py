"""`sonoedge engine` on small bundles: what it builds, says and refuses, and what a run that is ended leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sonoedge.bundle import Bundle, open_bundle
from sonoedge.device_profiles import load_profile
from sonoedge.engine_manifest import EngineSet, engines_folder, read_engines
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines import engine, make_set
from sonoedge.export.engines.builder import Target
from sonoedge.export.engines.here import Here
from sonoedge.runtime.sessions.gpu import Gpu

PROFILE = "rtx-sm86"

MakeBundle = Callable[..., Bundle]


def run(bundle: Path, *, profile: str | None = PROFILE, dry: bool = False, as_json: bool = True) -> None:
    engine.run(bundle, profile, dry, as_json=as_json)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same on machines with a GPU."""

    def missing() -> None:
        raise SonoEdgeError("cuda-python is not installed: pip install it")

    monkeypatch.setattr("sonoedge.export.engines.here.load_cudart", missing)


def test_engines_are_built_and_described(
    target: Target, make_bundle: MakeBundle, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle()
    run(bundle.root)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = engines_folder(bundle.root, PROFILE)
    written = read_engines(folder)
    assert told["golden"] == written.golden.state == "not run"
    assert told["folder"] == str(folder)
    assert (written.builder, written.builder_version, written.sm) == ("tensorrt_rtx", target.library.version, 86)
    assert (written.model, written.experts, written.kernels) == (bundle.manifest.model.id, "functions", None)
    assert written.driver is None
    assert [e.stage for e in written.engines] == ["vision", "decoder"]
    for described, made in zip(written.engines, told["engines"], strict=True):
        assert (folder / described.path).stat().st_size == described.bytes == made["bytes"]
        assert described.cache_in_place
        assert described.workspace_bytes
        assert made["products"]["not_int8"] == made["products"]["unpacked"] == []
        assert made["products"]["int8"] > 0
    assert {path.name for path in folder.iterdir()} == {"vision.plan", "decoder.plan", "engines.json"}
    assert open_bundle(bundle.root).manifest == bundle.manifest  # engines are outside the signed list


def test_a_normal_run_reads_well(
    target: Target, make_bundle: MakeBundle, no_gpu: None, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = make_bundle()
    run(bundle.root, as_json=False)
    printed = capsys.readouterr()
    first, vision, decoder, experts, golden = printed.out.splitlines()
    assert first == (f"{bundle.root}/engines/{PROFILE}: engines for {PROFILE} (sm_86), built by {target.library}")
    assert vision.startswith("  vision.plan: ")
    assert vision.endswith("1 of 1 products in int8; pictures of up to 64 patches")
    assert decoder.endswith("4 of 4 products in int8; passes of up to 2, 32 or 96 tokens that read up to 96")
    assert experts == (
        "experts: the portable function of standard operators, since "
        f"{target.library} takes no kernels compiled ahead of time"
    )
    assert golden == (
        "golden check: not run, since cuda-python is not installed; `sonoedge serve` runs it at its first start"
    )
    assert "build decoder.plan: done in" in printed.err


def test_a_second_run_replaces_the_first(target: Target, make_bundle: MakeBundle, no_gpu: None) -> None:
    bundle = make_bundle()
    run(bundle.root)
    (engines_folder(bundle.root, PROFILE) / "stale.plan").write_text("of an older SonoEdge")
    run(bundle.root)
    names = {path.name for path in (bundle.root / "engines").rglob("*")}
    assert names == {PROFILE, "vision.plan", "decoder.plan", "engines.json"}


def test_a_users_own_profile_works_the_same(
    target: Target, make_bundle: MakeBundle, no_gpu: None, tmp_path: Path
) -> None:
    text = Path(load_profile.__code__.co_filename).with_name("rtx-sm86.toml").read_text()
    own = tmp_path / "mine.toml"
    own.write_text(text.replace('id = "rtx-sm86"', 'id = "mine"').replace("[32, 256, 1024]", "[48]"))
    bundle = make_bundle()
    run(bundle.root, profile=str(own))
    buckets = read_engines(engines_folder(bundle.root, "mine")).engines[1].buckets
    assert [bucket.rows for bucket in buckets] == [48, 2]


# What a GPU of the profile's kind answers.


class Checked:
    """Stands for the golden check on a GPU of the profile's kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: float | SonoEdgeError = 1e-3
        self.seen: list[EngineSet] = []
        here = Here(Gpu("RTX A2000", 86, 12 << 30, False, "13.0", "580.65.06"))
        monkeypatch.setattr(make_set, "look_here", lambda _device, _library: here)
        monkeypatch.setattr(make_set, "check_engines", self)

    def __call__(self, _bundle: Bundle, folder: Path, engines: EngineSet, _library: Any) -> float:
        assert all((folder / e.path).is_file() for e in engines.engines)
        self.seen.append(engines)
        if isinstance(self.error, SonoEdgeError):
            raise self.error
        return self.error


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Checked:
    return Checked(monkeypatch)


def test_engines_are_checked_where_their_gpu_is(target: Target, make_bundle: MakeBundle, checked: Checked) -> None:
    bundle = make_bundle()
    run(bundle.root)
    written = read_engines(engines_folder(bundle.root, PROFILE))
    assert (written.golden.state, written.golden.error, written.driver) == ("passed", 1e-3, "580.65.06")


def test_a_wrong_engine_is_refused_and_the_old_set_stays(
    target: Target, make_bundle: MakeBundle, checked: Checked
) -> None:
    bundle = make_bundle()
    checked.error = SonoEdgeError("wrong")
    with pytest.raises(SonoEdgeError, match="wrong"):
        run(bundle.root)
    assert not (bundle.root / "engines").exists()
    checked.error = 1e-3
    run(bundle.root)
    before = read_engines(engines_folder(bundle.root, PROFILE))
    checked.error = SonoEdgeError("wrong")
    with pytest.raises(SonoEdgeError, match="wrong"):
        run(bundle.root)
    assert read_engines(engines_folder(bundle.root, PROFILE)) == before
