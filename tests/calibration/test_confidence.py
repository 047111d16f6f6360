"""Temperatures and the limit below which a hint is silent, on scores whose right answer is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonoedge.calibration.confidence import (
    choose,
    expected_calibration_error,
    fit,
    fit_platt,
    fit_temperature,
    fit_vector,
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


def biased(frames: int, seed: int) -> HintScores:
    """Scores that favour one candidate of four, which no temperature can undo."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 1.5, (frames, 4))
    right = [int(rng.choice(4, p=row)) for row in probabilities(made(scores, np.zeros(frames)), 1.0)]
    return made(scores + np.array([2.0, 0, 0, 0]), right)


def test_a_favoured_candidate_is_undone_by_vector_scaling() -> None:
    fitted, fresh = choose(biased(3000, 6)), biased(3000, 7)
    assert fitted.scale
    assert fitted.shift[0] < min(fitted.shift[1:]) - 1
    assert expected_calibration_error(fresh, fitted) < 0.03
    assert expected_calibration_error(fresh, fit_temperature(biased(3000, 6))) > expected_calibration_error(
        fresh, fitted
    )


def flat_at_the_top(frames: int, seed: int) -> HintScores:
    """Two candidates whose log-odds claim 95 to 99.8 % while the likelier is right in 55 to 98 % of the frames."""
    rng = np.random.default_rng(seed)
    lead = rng.uniform(3, 6, frames)
    side = rng.integers(0, 2, frames)
    scores = np.stack([np.where(side == 0, lead, 0.0), np.where(side == 1, lead, 0.0)], axis=1)
    wrong = rng.random(frames) > 1 / (1 + np.exp(3.4 - 1.2 * lead))
    return made(scores, np.where(wrong, 1 - side, side))


def test_platt_moves_the_top_and_keeps_the_answer() -> None:
    scores, fresh = flat_at_the_top(3000, 8), flat_at_the_top(3000, 9)
    line = fit_platt(scores)
    assert line.platt is not None
    assert choose(scores).platt == line.platt
    shares = probabilities(fresh, line)
    assert shares.sum(axis=1) == pytest.approx(1)
    assert (shares.argmax(axis=1) == fresh.scores.argmax(axis=1)).all()
    assert expected_calibration_error(fresh, line) < 0.03
    assert negative_log_likelihood(fresh, line) < negative_log_likelihood(fresh, fit_temperature(scores)) - 0.002


def test_more_parameters_are_not_taken_where_they_gain_nothing() -> None:
    scores = drawn(2000, 2.0)
    assert choose(scores) == fit_temperature(scores)
    assert negative_log_likelihood(scores, fit_vector(scores)) <= negative_log_likelihood(scores, choose(scores))
    few = biased(60, 6)
    assert choose(few) == fit_temperature(few)
