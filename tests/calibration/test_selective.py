"""Risk-coverage areas and AUROC against values worked out by hand."""

import numpy as np
import pytest

from sonoedge.calibration.selective import auroc, risk_coverage


def test_areas_of_a_small_example() -> None:
    curve = risk_coverage(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False]))
    assert curve.coverage == (0.25, 0.5, 0.75, 1.0)
    assert curve.risk == pytest.approx((0, 1 / 2, 1 / 3, 1 / 2))
    assert curve.aurc == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert curve.augrc == pytest.approx((0 + 1 / 4 + 1 / 4 + 2 / 4) / 4)


def test_equal_confidence_does_not_depend_on_the_order() -> None:
    right = np.array([True, True, False, False])
    same = np.full(4, 0.5)
    assert risk_coverage(same, right) == risk_coverage(same, right[::-1])
    assert risk_coverage(same, right).aurc == pytest.approx(0.5)


def test_a_good_ranking_costs_less() -> None:
    rng = np.random.default_rng(2)
    right = rng.random(500) < 0.8
    good = risk_coverage(right + rng.normal(0, 0.3, 500), right)
    blind = risk_coverage(rng.random(500), right)
    assert good.aurc < 0.5 * blind.aurc
    assert good.augrc < 0.5 * blind.augrc
    assert good.risk[-1] == blind.risk[-1] == pytest.approx(1 - right.mean())


def test_auroc() -> None:
    assert auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 1.0
    assert auroc(np.array([1.0, 2.0]), np.array([2.0])) == 0.75
    assert auroc(np.array([1.0, 3.0]), np.array([2.0])) == 0.5
