"""Sets of stated coverage: reached on fresh frames, also by quality, and every candidate where nothing can be told."""

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.bundle import HintCalibration
from sonoedge.calibration.conformal import calibrate, covered, floor_of, with_sets
from sonoedge.calibration.phantom import Truth
from sonoedge.calibration.scores import HintScores, ScoredFrames
from sonoedge.errors import SonoEdgeError


def drawn(frames: int, seed: int) -> tuple[HintScores, npt.NDArray[np.str_]]:
    """Overconfident scores of five candidates, and which frames are poor: there they say much less than they claim."""
    rng = np.random.default_rng(seed)
    poor = rng.random(frames) < 0.4
    right = rng.integers(0, 5, frames)
    signal = np.where(poor, 1.0, 2.0)[:, None] * np.eye(5)[right]
    scores = 2.5 * (signal + rng.normal(0, 1, (frames, 5)))
    names = np.where(poor, "poor", "good")
    return HintScores(np.arange(frames), scores.astype(np.float32), right.astype(np.int64)), names


@pytest.mark.parametrize("coverage", [0.9, 0.95])
def test_fresh_frames_are_covered_as_promised_whatever_the_probabilities_are_worth(coverage: float) -> None:
    calibration = with_sets(HintCalibration(), drawn(4000, 1)[0], coverage)
    inside, size = covered(drawn(4000, 2)[0], calibration)
    assert inside.mean() == pytest.approx(coverage, abs=0.02)
    assert 1 < size.mean() < 4


def test_a_floor_for_each_quality_covers_both() -> None:
    held_back, names = drawn(4000, 1)
    fresh, fresh_names = drawn(4000, 2)
    common, _ = covered(fresh, with_sets(HintCalibration(), held_back, 0.9))
    split, _ = covered(fresh, with_sets(HintCalibration(), held_back, 0.9, names), fresh_names)
    poor = fresh_names == "poor"
    assert common[poor].mean() < 0.88
    assert split[poor].mean() == pytest.approx(0.9, abs=0.02)
    assert split[~poor].mean() == pytest.approx(0.9, abs=0.02)


def test_a_rare_quality_keeps_the_common_floor() -> None:
    held_back, names = drawn(400, 1)
    names[:] = "good"
    names[:20] = "poor"
    assert set(with_sets(HintCalibration(), held_back, 0.9, names).set_floors) == {"good"}


def test_too_few_frames_for_the_promise_leave_every_candidate() -> None:
    held_back, _ = drawn(9, 1)
    calibration = with_sets(HintCalibration(), held_back, 0.95)
    assert calibration.set_floor == 0.0
    inside, size = covered(held_back, calibration)
    assert inside.all()
    assert (size == 5).all()


def test_the_rank_of_the_floor() -> None:
    shares = np.arange(1, 20) / 20  # 19 frames: one in twenty may fall under the floor
    assert floor_of(shares, 0.95) == pytest.approx(0.05)
    assert floor_of(shares, 0.90) == pytest.approx(0.10)
    assert floor_of(shares, 0.96) == 0.0


def test_a_pool_is_calibrated_on_one_half_and_its_sets_on_the_other() -> None:
    scores, _ = drawn(2000, 4)
    truths = (Truth("liver", "good", "linear", 0.2, None, 0, 224),) * 2000
    scored = ScoredFrames({"region": scores}, np.zeros((2000, 2), np.float32), truths)
    fitted = calibrate(scored, 0.9, 0.95)["region"]
    changed = scores.right.copy()
    changed[1::2] = 0  # of the frames that the sets must not see: only the calibration moves
    other = calibrate(
        ScoredFrames({"region": msgspec.structs.replace(scores, right=changed)}, scored.mean_embeds, truths), 0.9, 0.95
    )["region"]
    assert fitted.coverage == other.coverage == 0.95
    assert fitted.temperature != other.temperature
    inside, _ = covered(drawn(4000, 5)[0], fitted)
    assert inside.mean() == pytest.approx(0.95, abs=0.02)


def test_a_pool_with_nothing_to_calibrate_on_is_refused() -> None:
    scores, _ = drawn(1, 1)
    truths = (Truth("liver", "good", "linear", 0.2, None, 0, 224),)
    with pytest.raises(SonoEdgeError, match=r"hints.frames = 1: .* region"):
        calibrate(ScoredFrames({"region": scores}, np.zeros((1, 2), np.float32), truths), 0.9, 0.95)
