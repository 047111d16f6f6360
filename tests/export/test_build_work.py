"""The working folder of a build: kept by halts, gone after success and refusals, locked while it is used."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.build_work import BuildWork


def left_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_nothing_is_left_after_success_but_the_bundle(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "bundle"
    with BuildWork(out, "one") as work:
        assert not work.resumed
        assert work.folder.parent == out.parent
        work.weights.write_bytes(b"w")
        work.bundle.mkdir()
        work.link_weights(work.bundle / "weights")
        assert (work.bundle / "weights").samefile(work.weights)
        work.bundle.rename(out)
    assert left_in(tmp_path) == ["a", "a/b", "a/b/bundle", "a/b/bundle/weights"]
    assert (out / "weights").read_bytes() == b"w"


@pytest.mark.parametrize("made", [True, False])
def test_nothing_is_left_after_a_refusal(tmp_path: Path, made: bool) -> None:
    """Folders that the build made go too, those of others stay."""
    out = tmp_path / "a" / "b" / "bundle"
    if not made:
        out.parent.mkdir(parents=True)
    with pytest.raises(SonoEdgeError, match="no"), BuildWork(out, "one") as work:
        work.weights.write_bytes(b"w")
        raise SonoEdgeError("no")
    assert left_in(tmp_path) == ([] if made else ["a", "a/b"])


@pytest.mark.parametrize("halt", [KeyboardInterrupt(), ZeroDivisionError(), OSError(errno.EIO, "broken")])
def test_a_halt_keeps_the_work_for_the_next_run(tmp_path: Path, halt: BaseException) -> None:
    """But not the half-made bundle."""
    out = tmp_path / "bundle"
    with pytest.raises(type(halt)), BuildWork(out, "one") as work:
        work.weights.write_bytes(b"w")
        work.bundle.mkdir()
        (work.bundle / "graph").write_bytes(b"g")
        raise halt
    with BuildWork(out, "one") as work:
        assert work.resumed
        assert work.weights.read_bytes() == b"w"
        assert not work.bundle.exists()
    assert left_in(tmp_path) == []


def test_another_identity_clears_the_work(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(KeyboardInterrupt), BuildWork(out, "one") as work:
        work.weights.write_bytes(b"w")
        (work.folder / "tuned").mkdir()
        (work.folder / "tuned" / "model.safetensors").write_bytes(b"t")
        raise KeyboardInterrupt
    with BuildWork(out, "two") as work:
        assert not work.resumed
        assert left_in(work.folder) == ["identity", "lock"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("told", [False, True])
def test_a_full_disk_is_told_and_can_be_resumed(tmp_path: Path, code: int, told: bool) -> None:
    """`told`: another part has put it into words of its own already."""
    out = tmp_path / "bundle"
    with (
        pytest.raises(SonoEdgeError, match=r"bundle: the disk is full: free space; what is finished is kept, run the"),
        BuildWork(out, "one") as work,
    ):
        work.weights.write_bytes(b"w")
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            if told:
                raise SonoEdgeError("the bundle's disk is full") from error
            raise
    with BuildWork(out, "one") as work:
        assert work.resumed
        assert work.weights.read_bytes() == b"w"


def test_two_builds_of_one_bundle_at_once_are_refused(tmp_path: Path) -> None:
    """The first is not disturbed; another bundle beside it may be built."""
    out = tmp_path / "bundle"
    with BuildWork(out, "one") as work:
        work.weights.write_bytes(b"w")
        for identity in ("one", "two"):
            with (
                pytest.raises(SonoEdgeError, match="bundle is being built by another process: wait"),
                BuildWork(out, identity),
            ):
                pass
        with BuildWork(tmp_path / "other", "one"):
            pass
        assert work.weights.read_bytes() == b"w"
        assert (work.folder / "identity").read_text() == "one"
    assert left_in(tmp_path) == []


def test_a_process_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom sonoedge.export.build_work import BuildWork\n"
        "with BuildWork(Path(sys.argv[1]), 'one') as work:\n"
        "    work.weights.write_bytes(b'w')\n    os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "bundle"], check=False)
    assert ended.returncode == -9
    with BuildWork(tmp_path / "bundle", "one") as work:
        assert work.resumed


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(SonoEdgeError, match=r"bundle cannot be written \(Not a directory\): choose another --out"),
        BuildWork(tmp_path / "file" / "bundle", "one"),
    ):
        pass
    assert left_in(tmp_path) == ["file"]
