"""Familiarity: a known kind of picture passes as often as asked, an unseen one does not, too few frames are refused."""

from pathlib import Path

import numpy as np
import pytest

from sonoedge.calibration.known import fit_familiarity
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.familiarity import load_familiarity


def embeds(frames: int, seed: int, shift: float = 0.0) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Mean embeddings [frames, 12] that vary in three directions."""
    rng = np.random.default_rng(seed)
    directions = np.random.default_rng(0).normal(0, 1, (3, 12))
    made = rng.normal(0, (3, 1, 0.5), (frames, 3)) @ directions + 7
    return (made + shift * np.random.default_rng(1).normal(0, 1, 12)).astype(np.float32)


@pytest.mark.parametrize("share", [0.8, 0.95])
def test_known_frames_pass_as_often_as_asked(share: float) -> None:
    known = fit_familiarity(embeds(2000, 2), share)
    fresh = embeds(1000, 3)
    passed = np.mean([not known.is_unseen(row[None]) for row in fresh])
    assert passed == pytest.approx(share, abs=0.03)


def test_unseen_frames_are_recognised() -> None:
    known = fit_familiarity(embeds(400, 2), 0.99)
    far = embeds(100, 3, shift=6.0)
    assert np.mean([known.is_unseen(row[None]) for row in far]) > 0.95


@pytest.mark.parametrize("frames", [1, 2, 7])
def test_a_handful_of_frames_is_refused(frames: int) -> None:
    with pytest.raises(SonoEdgeError, match=f"hints.frames = {frames}: .* use at least 8"):
        fit_familiarity(embeds(frames, 2), 0.99)


def test_fewer_frames_than_directions_ask_for_more() -> None:
    rng = np.random.default_rng(4)
    with pytest.raises(SonoEdgeError, match=r"hints.frames = 20: .* use at least \d\d"):
        fit_familiarity(rng.normal(0, 1, (20, 64)).astype(np.float32), 0.99)


def regional(frames: int, seed: int) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.float32]], list[str]]:
    """Embeddings of three regions that lie far apart, each narrow; between them is nothing known."""
    rng = np.random.default_rng(seed)
    places = np.array([[8.0, 0, 0], [-8.0, 0, 0], [0, 8.0, 0]])
    shown = rng.integers(0, 3, frames)
    made = (places[shown] + rng.normal(0, 1, (frames, 3))) @ np.random.default_rng(0).normal(0, 1, (3, 12))
    return (made + rng.normal(0, 0.01, made.shape)).astype(np.float32), [f"region {row}" for row in shown]


def test_what_lies_between_the_regions_is_unseen(tmp_path: Path) -> None:
    table, regions = regional(1500, 2)
    plain, nearest = fit_familiarity(table, 0.95), fit_familiarity(table, 0.95, regions)
    nearest.save(tmp_path / "known.npz")
    nearest = load_familiarity(tmp_path / "known.npz")
    fresh, _ = regional(1000, 3)
    assert np.mean([not nearest.is_unseen(row[None]) for row in fresh]) == pytest.approx(0.95, abs=0.03)
    between = (np.random.default_rng(4).normal(0, 1, (200, 3)) @ np.random.default_rng(0).normal(0, 1, (3, 12))).astype(
        np.float32
    )
    assert np.mean([plain.is_unseen(row[None]) for row in between]) < 0.1
    assert np.mean([nearest.is_unseen(row[None]) for row in between]) > 0.9
    assert all(nearest.is_unseen(row[None]) for row in between + np.float32(100))  # far from everything


def test_one_region_alone_and_a_handful_of_frames_work() -> None:
    table = embeds(400, 2)
    alone = fit_familiarity(table, 0.95, ["liver"] * 400)
    assert np.mean([not alone.is_unseen(row[None]) for row in embeds(400, 3)]) == pytest.approx(0.95, abs=0.04)
    assert np.mean([alone.is_unseen(row[None]) for row in embeds(100, 3, shift=6.0)]) > 0.95
