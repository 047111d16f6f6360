"""Intervals cover what they promise, tests call no difference where there is none, and p-values are known ones."""

import numpy as np
import pytest

from sonoedge.export.evaluation import resampling
from sonoedge.export.evaluation.measures import Measure
from sonoedge.export.evaluation.resampling import FEWEST_CASES, Resampler, mcnemar


def share(right: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Measure:
    rows = np.stack([right, np.ones(len(right))], axis=1).astype(np.float64)
    return Measure("accuracy", rows, lambda sums: float(100 * sums[0] / sums[1]), share=True)


def interval(measure: Measure, owners: np.ndarray[tuple[int], np.dtype[np.int64]], seed: int) -> resampling.Interval:
    resampler = Resampler(owners, seed)
    return resampler.interval(measure, resampler.scores(measure))


@pytest.mark.parametrize(("truth", "cases", "each"), [(0.5, 60, 1), (0.85, 80, 1), (0.7, 60, 3)])
def test_intervals_hold_the_truth_about_as_often_as_they_say(
    truth: float, cases: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resampling, "RESAMPLES", 300)
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(300):
        # Questions of one case go right together: each case has its own difficulty around the truth.
        own = rng.beta(truth * 4, (1 - truth) * 4, cases)
        right = rng.random((cases, each)) < own[:, None]
        found = interval(share(right.reshape(-1)), np.repeat(np.arange(cases), each), seed)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 100 * truth <= found.high
    assert 0.90 <= held / 300 <= 0.99


def test_questions_of_one_case_are_not_taken_as_independent() -> None:
    right = np.random.default_rng(0).random(50) < 0.5
    alone = interval(share(right), np.arange(50), 3)
    tenfold = interval(share(np.repeat(right, 10)), np.repeat(np.arange(50), 10), 3)
    assert (alone.low, alone.high) == (tenfold.low, tenfold.high)


def test_two_equal_systems_differ_by_chance_as_often_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampling, "RESAMPLES", 10)
    monkeypatch.setattr(resampling, "PERMUTATIONS", 300)
    rng = np.random.default_rng(2)
    randomised, exact = 0, 0
    for seed in range(300):
        easy = rng.random(60)
        first, second = rng.random((2, 60)) < easy
        resampler = Resampler(np.arange(60), seed)
        randomised += resampler.randomisation(share(first), share(second)) < 0.05
        exact += mcnemar(first.tolist(), second.tolist()).p_value < 0.05
    assert 0.01 <= randomised / 300 <= 0.09
    assert exact / 300 <= 0.07  # exact tests are cautious


def test_a_real_difference_is_found_and_its_interval_is_paired() -> None:
    rng = np.random.default_rng(3)
    easy = rng.random(200)
    first, second = easy > 0.5, easy > 0.35  # the second is right wherever the first is
    resampler = Resampler(np.arange(200))
    one, other = share(first), share(second)
    drawn = resampler.scores(one), resampler.scores(other)
    found = resampler.difference(one, other, drawn)
    assert found.value == pytest.approx(100 * (second.mean() - first.mean()))
    assert found.low is not None
    assert found.low > 0
    assert resampler.randomisation(one, other) < 0.001
    assert resampler.difference(one, one, (drawn[0], drawn[0])).high == 0
    assert resampler.randomisation(one, one) == 1


def test_mcnemar_is_the_exact_binomial_test() -> None:
    # 1 against 9 of 10: two-sided 2·(1 + 10)/1024
    first = [True] * 1 + [False] * 9 + [True] * 30
    second = [False] * 1 + [True] * 9 + [True] * 30
    found = mcnemar(first, second)
    assert (found.first_only, found.second_only) == (1, 9)
    assert found.p_value == pytest.approx(22 / 1024)
    assert mcnemar(first, first).p_value == 1


def test_all_right_is_not_certainty() -> None:
    owners = np.arange(20)
    found = interval(share(np.ones(20, np.bool_)), owners, 0)
    # Clopper and Pearson's lower bound of 20 of 20 at 95 %
    assert found.low == pytest.approx(100 * 0.025 ** (1 / 20))
    assert found.low == pytest.approx(83.16, abs=0.01)
    assert found.high == 100
    none = interval(share(np.zeros(20, np.bool_)), owners, 0)
    assert none.low == 0
    assert none.high == pytest.approx(16.84, abs=0.01)


def test_too_few_cases_have_no_bounds() -> None:
    few = FEWEST_CASES - 1
    assert interval(share(np.arange(few) % 2 == 0), np.arange(few), 0).low is None
    assert interval(share(np.arange(few + 1) % 2 == 0), np.arange(few + 1), 0).low is not None


def test_equal_seeds_give_equal_intervals() -> None:
    measure = share(np.random.default_rng(0).random(40) < 0.6)
    first, again, other = (Resampler(np.arange(40), seed).scores(measure) for seed in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
