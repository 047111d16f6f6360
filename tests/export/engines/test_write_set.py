"""Engines take the place of older ones in one go: the old set or the new, whatever ends the run."""

from pathlib import Path

import pytest

from sonoedge.engine_manifest import EngineSet, Golden, engines_folder, read_engines
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.timing import TIMING_CACHE
from sonoedge.export.engines.write_set import SetWriter

PROFILE = "rtx-sm86"


def described(model: str) -> EngineSet:
    return EngineSet(
        profile=PROFILE,
        sm=86,
        builder="tensorrt_rtx",
        builder_version="1.7",
        driver=None,
        model=model,
        experts="none",
        kernels=None,
        engines=(),
        golden=Golden("not run"),
    )


def write(bundle: Path, model: str) -> None:
    with SetWriter(bundle, PROFILE) as writer:
        (writer.folder / "vision.plan").write_text(model)
        (writer.folder / TIMING_CACHE).write_text(f"timings of {model}")
        writer.commit(described(model))


def names(bundle: Path) -> set[str]:
    return {path.relative_to(bundle).as_posix() for path in bundle.rglob("*")}


def test_a_new_set_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    write(tmp_path, "one")
    with SetWriter(tmp_path, PROFILE) as writer:
        assert (writer.folder / TIMING_CACHE).read_text() == "timings of one"  # the next build need not measure again
        (writer.folder / "decoder.plan").write_text("two")
        assert (engines_folder(tmp_path, PROFILE) / "vision.plan").read_text() == "one"
        writer.commit(described("two"))
    assert read_engines(engines_folder(tmp_path, PROFILE)).model == "two"
    files = {f"engines/{PROFILE}/{name}" for name in ("decoder.plan", "engines.json", TIMING_CACHE)}
    assert names(tmp_path) == {"engines", f"engines/{PROFILE}", *files}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SonoEdgeError("wrong"), OSError(28, "No space left on device")])
def test_what_ends_early_leaves_what_was_there(error: BaseException, tmp_path: Path) -> None:
    def fail() -> None:
        before = names(tmp_path)
        with pytest.raises((KeyboardInterrupt, SonoEdgeError)) as ended, SetWriter(tmp_path, PROFILE) as writer:
            (writer.folder / "vision.plan").write_text("half")
            raise error
        assert names(tmp_path) == before
        if isinstance(error, OSError):
            assert str(ended.value).endswith("the disk is full: free space and run it again")

    fail()
    assert names(tmp_path) == set()
    write(tmp_path, "old")
    fail()
    assert read_engines(engines_folder(tmp_path, PROFILE)).model == "old"


def test_the_remains_of_a_killed_run_are_cleared_up(tmp_path: Path) -> None:
    write(tmp_path, "old")
    place = engines_folder(tmp_path, PROFILE)
    place.rename(place.with_name(f".{PROFILE}.previous"))  # killed between the two renames
    place.with_name(f".{PROFILE}.partial").mkdir()
    (place.with_name(f".{PROFILE}.partial") / "vision.plan").write_text("half")
    with SetWriter(tmp_path, PROFILE) as writer:
        assert read_engines(place).model == "old"
        assert [path.name for path in writer.folder.iterdir()] == [TIMING_CACHE]
    write(tmp_path, "new")
    place.with_name(f".{PROFILE}.previous").mkdir()  # killed after both
    write(tmp_path, "newer")
    assert read_engines(place).model == "newer"
    assert not [name for name in names(tmp_path) if ".previous" in name or ".partial" in name]


def test_two_runs_take_turns(tmp_path: Path) -> None:
    with SetWriter(tmp_path, PROFILE) as first:
        (first.folder / "vision.plan").write_text("first")
        with pytest.raises(SonoEdgeError, match="another run is building engines"), SetWriter(tmp_path, PROFILE):
            pass
        assert (first.folder / "vision.plan").exists()
        first.commit(described("first"))
    write(tmp_path, "second")
    assert read_engines(engines_folder(tmp_path, PROFILE)).model == "second"


def test_engines_of_other_profiles_stay(tmp_path: Path) -> None:
    other = engines_folder(tmp_path, "rtx-sm89")
    other.mkdir(parents=True)
    (other / "vision.plan").write_text("other")
    write(tmp_path, "one")
    assert (other / "vision.plan").read_text() == "other"


def test_a_bundle_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engines").write_text("a file")
    with pytest.raises(SonoEdgeError, match=r"engines cannot be written \(File exists\)"), SetWriter(tmp_path, PROFILE):
        pass
    assert (tmp_path / "engines").read_text() == "a file"
