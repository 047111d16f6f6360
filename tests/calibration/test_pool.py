"""Pools of phantoms: a mirrored frame's truth agrees with its pixels, and a killed rendering goes on where it was."""

from pathlib import Path

import numpy as np
import pytest

from sonoedge.bundle import ImageSpec
from sonoedge.calibration import pool as pools
from sonoedge.calibration.phantom_text import truth_fields
from sonoedge.calibration.pool import PhantomPool, lesion_class, mirror, phantom_pool, render
from sonoedge.errors import SonoEdgeError

SPEC = ImageSpec(max_pixels=84 * 84)


def test_lesion_lies_where_the_truth_says(frames: PhantomPool) -> None:
    with_lesion = [i for i in range(len(frames)) if frames.truths[i].lesion is not None]
    assert 8 < len(with_lesion) < len(frames), "the pool must hold frames of both sorts"
    for index in with_lesion:
        for frame in (frames[index], frames.mirrored(index)):
            lesion = frame.truth.lesion
            assert lesion is not None
            rows, columns = np.nonzero(frame.lesion_classes)
            patch = frame.truth.size / frame.lesion_classes.shape[0]
            x, y = (columns.mean() + 0.5) * patch, (rows.mean() + 0.5) * patch
            assert abs(x - lesion.centre_px[0]) < patch
            assert abs(y - lesion.centre_px[1]) < patch
            assert set(frame.lesion_classes[rows, columns]) == {lesion_class(frame.truth)}
            assert (lesion.side == "left") == (lesion.centre_px[0] < frame.truth.size / 2)


def test_frames_without_lesion_have_no_lesion_patch(frames: PhantomPool) -> None:
    for index, truth in enumerate(frames.truths):
        assert (truth.lesion is None) == (not frames[index].lesion_classes.any())
        assert (truth.lesion is None) == (not frames.mirrored(index).lesion_classes.any())


def test_mirroring_turns_pixels_and_patches_and_twice_is_nothing(frames: PhantomPool) -> None:
    for index in range(len(frames)):
        frame, turned = frames[index], frames.mirrored(index)
        assert np.array_equal(turned.grey, frame.grey[:, ::-1])
        assert np.array_equal(turned.lesion_classes > 0, frame.lesion_classes[:, ::-1] > 0)
        again = mirror(turned)
        assert np.array_equal(again.grey, frame.grey)
        assert np.array_equal(again.lesion_classes, frame.lesion_classes)
        assert truth_fields(again.truth) == truth_fields(frame.truth)


def test_classes_tell_kind_and_side_apart(frames: PhantomPool) -> None:
    seen = {(t.lesion.kind, t.lesion.side): lesion_class(t) for t in frames.truths if t.lesion is not None}
    assert len(set(seen.values())) == len(seen)
    assert all(0 < index < pools.LESION_CLASSES for index in seen.values())


def test_patches_are_those_of_the_runtime(frames: PhantomPool) -> None:
    patches = frames[0].patches(SPEC)
    assert patches.grid == (1, 6, 6)
    assert patches.values.shape == (36, 1176)


def test_a_killed_rendering_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "CHUNK", 3)
    first = phantom_pool(tmp_path, 7, first_seed=40, spec=SPEC, workers=1)
    chunks = sorted(tmp_path.glob("*.npz"))
    assert len(chunks) == 3
    kept = {path: path.stat().st_mtime_ns for path in chunks[:2]}
    chunks[2].unlink()  # as a kill before the last chunk leaves it, with what it had begun
    (tmp_path / f"{chunks[2].stem}.4711.tmp").write_bytes(b"half")
    second = phantom_pool(tmp_path, 7, first_seed=40, spec=SPEC, workers=1)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert np.array_equal(first.greys, second.greys)
    assert np.array_equal(first.classes, second.classes)
    assert list(first.truths) == list(second.truths)
    assert [truth.seed for truth in second.truths] == list(range(40, 47))
    alone = render(45, SPEC)
    assert np.array_equal(second[5].grey, alone.grey)
    assert second[5].truth == alone.truth

    with pytest.raises(SonoEdgeError, match=r"phantoms-40-3.npz holds frames of \(84, 84\) pixels .* \(56, 56\)"):
        phantom_pool(tmp_path, 7, first_seed=40, spec=ImageSpec(max_pixels=56 * 56))
    chunks[1].write_bytes(chunks[1].read_bytes()[:-60])
    with pytest.raises(SonoEdgeError, match=r"phantoms-43-3.npz is damaged .* remove it"):
        phantom_pool(tmp_path, 7, first_seed=40, spec=SPEC)


def test_an_empty_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="frames = 0"):
        phantom_pool(tmp_path, 0, first_seed=1, spec=SPEC)


def test_an_error_of_a_worker_arrives(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="seed -2 is negative"):
        phantom_pool(tmp_path, 1, first_seed=-2, spec=SPEC, workers=1)
    assert not list(tmp_path.glob("*.npz"))


def test_a_pool_of_one_region_is_not_taken_for_one_of_all(tmp_path: Path) -> None:
    mixed = phantom_pool(tmp_path, 4, first_seed=40, spec=SPEC, workers=1)
    livers = phantom_pool(tmp_path, 4, first_seed=40, spec=SPEC, region="liver", workers=1)
    assert {truth.region for truth in livers.truths} == {"liver"}
    assert len({truth.region for truth in mixed.truths}) > 1
    assert [truth.seed for truth in livers.truths] == [truth.seed for truth in mixed.truths]
    assert livers[1].truth == render(41, SPEC, "liver").truth
