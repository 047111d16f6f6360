"""Temperatures and the limit below which a hint is silent, on scores whose right answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonoedge.calibration.confidence import (
    expected_calibration_error,
    fit,
    negative_log_likelihood,
    probabilities,
)
from sonoedge.calibration.scores import HintScores


def made(scores: object, right: object) -> HintScores:
    table = np.asarray(scores, np.float32)
    return HintScores(np.arange(len(table)), table, np.asarray(right, np.int64))


def drawn(frames: int, sharpness: float) -> HintScores:
    """Answers drawn from the model's own probabilities, and scores `sharpness` times as extreme."""
    rng = np.random.default_rng(5)
    scores = rng.normal(0, 1.5, (frames, 4)).astype(np.float32)
    shares = probabilities(made(scores, np.zeros(frames)), 1.0)
    right = [int(rng.choice(4, p=row)) for row in shares]
    return made(scores * sharpness, right)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_temperature_undoes_overconfidence(sharpness: float) -> None:
    scores = drawn(4000, sharpness)
    fitted = fit(scores, 0.9)
    assert fitted.temperature == pytest.approx(sharpness, rel=0.1)
    assert expected_calibration_error(scores, fitted.temperature) < 0.03
    if sharpness == 3.0:
        assert expected_calibration_error(scores, 1.0) > 0.15
        assert negative_log_likelihood(scores, fitted.temperature) < negative_log_likelihood(scores, 1.0)


def test_answers_above_the_limit_are_right_often_enough() -> None:
    scores = drawn(4000, 1.0)
    fitted = fit(scores, 0.9)
    sure = probabilities(scores, fitted.temperature).max(axis=1) >= fitted.abstain_below
    assert 0.05 < sure.mean() < 0.9
    assert scores.correct[sure].mean() == pytest.approx(0.9, abs=0.005)


def test_a_hint_that_is_always_sure_and_right_is_not_silenced() -> None:
    scores = made([[60.0, 0.0], [0.0, 80.0], [70.0, 0.0]], [0, 1, 0])
    fitted = fit(scores, 0.99)
    assert fitted.abstain_below < 1
    assert (probabilities(scores, fitted.temperature).astype(np.float32).max(axis=1) >= fitted.abstain_below).all()


def test_a_hint_that_is_never_right_is_silent() -> None:
    scores = made([[1.0, 0.0], [0.0, 2.0]], [1, 0])
    assert fit(scores, 0.9).abstain_below == 1.0


def test_frames_of_equal_confidence_speak_or_stay_silent_together() -> None:
    scores = made([[2.0, 0.0]] * 10 + [[0.5, 0.0]] * 10, [0] * 10 + [0] * 5 + [1] * 5)
    fitted = fit(scores, 0.95)  # the five right ones among the last ten must not let the five wrong ones speak
    sure = probabilities(scores, fitted.temperature).max(axis=1) >= fitted.abstain_below
    assert sure.tolist() == [True] * 10 + [False] * 10


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=3), st.integers(0, 2)),
        min_size=1,
        max_size=40,
    ),
    st.floats(0.5, 1.0),
)
def test_speaking_frames_reach_the_accuracy(frames: list[tuple[list[float], int]], least: float) -> None:
    scores = made([row for row, _ in frames], [right for _, right in frames])
    fitted = fit(scores, least)
    assert 0 < fitted.abstain_below <= 1
    confidence = probabilities(scores, fitted.temperature).max(axis=1)
    limit = confidence[confidence >= fitted.abstain_below + 1e-4]
    sure = confidence >= (limit.min() if limit.size else 2.0)
    if fitted.abstain_below < 1 and sure.any() and (confidence >= fitted.abstain_below).sum() == sure.sum():
        assert scores.correct[sure].mean() >= least


def test_probabilities_of_extreme_scores() -> None:
    shares = probabilities(made([[1e4, -1e4, 0.0]], [0]), 0.25)
    assert shares.tolist() == [[1.0, 0.0, 0.0]]
    assert negative_log_likelihood(made([[1e4, -1e4]], [1]), 1.0) < 30
