"""SmoothQuant: factors that help where a channel stands out, none where nothing is gained, one hash for one content."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sonoedge.calibration.smoothing import LARGEST, SMALLEST, Found, Smoothing, evenly, search


def int8_error(x: Tensor, weight: Tensor, columns: Tensor) -> float:
    """Relative squared error of the int8 product in integers, written without the module under test."""
    a, w = (x / columns).double().numpy(), (weight * columns).double().numpy()
    a_scale, w_scale = np.abs(a).max() / 127, np.abs(w).max(axis=1) / 127
    product = (np.rint(a / a_scale).astype(int) @ np.rint(w / w_scale[:, None]).astype(int).T) * a_scale * w_scale
    exact = (x.double() @ weight.double().T).numpy()
    return float(((product - exact) ** 2).sum() / (exact**2).sum())


def outliers(seed: int, tokens: int = 96, columns: int = 32) -> tuple[Tensor, Tensor]:
    """An input of which two channels stand out, and a weight that reads it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, 3] *= 80
    x[:, 17] *= 25
    return x, torch.randn(24, columns, generator=generator)


def best(x: Tensor, weights: list[Tensor], channel: Tensor) -> Found:
    """The search judged on the very tokens that the factors are made of."""
    maximum = torch.cat((torch.zeros(1, x.shape[1]), x.abs())).amax(0)
    return search(x, maximum, maximum, weights, channel)


@pytest.mark.parametrize("seed", range(3))
def test_outlier_channels_are_moved_into_the_weights(seed: int) -> None:
    x, weight = outliers(seed)
    found = best(x, [weight], torch.arange(32))
    assert 0 < found.alpha <= 1
    before, after = int8_error(x, weight, torch.ones(32)), int8_error(x, weight, found.factors)
    print(f"alpha {found.alpha}, relative error {before:.2e} to {after:.2e}")
    assert after < before / 5
    assert int(found.factors.argmax()) == 3


@pytest.mark.parametrize("matrices", [1, 3])
def test_alpha_is_the_best_of_the_grid_for_all_matrices_that_read_the_input(matrices: int) -> None:
    x, weight = outliers(7)
    others = [torch.randn(40, 32, generator=torch.Generator().manual_seed(n)) * 10**n for n in range(1, matrices)]
    weights = [weight, *others]
    maximum = x.abs().amax(0)
    found = best(x, weights, torch.arange(32))
    errors = {}
    for alpha in (n / 10 for n in range(11)):
        factors = maximum**alpha / torch.cat(weights).abs().amax(0) ** (1 - alpha) if alpha else torch.ones(32)
        errors[alpha] = sum(int8_error(x, each, factors) for each in weights)
    assert errors[found.alpha] == pytest.approx(min(errors.values()), rel=1e-3)
    reached = sum(int8_error(x, each, found.factors) for each in weights)
    assert reached == pytest.approx(errors[found.alpha], rel=1e-3)  # a factor common to all channels is free


def test_alpha_is_judged_on_other_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 32, generator=generator) ** 3  # heavy tails
    weight = torch.randn(24, 32, generator=generator)
    few, others = x[:4], x[4:]
    maximum = few.abs().amax(0)
    fitted = search(few, maximum, maximum, [weight], torch.arange(32))
    judged = search(others, maximum, x.abs().amax(0), [weight], torch.arange(32))
    assert judged.alpha < fitted.alpha  # which fits every channel to the largest of four values
    assert int8_error(others, weight, judged.factors) < int8_error(others, weight, fitted.factors)


def test_nothing_is_moved_where_int8_is_exact() -> None:
    x = torch.randint(-127, 128, (64, 8), generator=torch.Generator().manual_seed(0)).float()
    weight = torch.randint(-127, 128, (8, 8), generator=torch.Generator().manual_seed(1)).float()
    x[0], weight[:, 0] = 127, 127
    found = best(x, [weight], torch.arange(8))
    assert found.alpha == 0
    assert torch.equal(found.factors, torch.ones(8))


def test_a_channel_read_by_several_columns_has_one_factor() -> None:
    x, weight = outliers(4, columns=32)
    channel = torch.arange(8).repeat(4)
    found = best(x, [weight], channel)
    assert found.factors.shape == (8,)
    assert int8_error(x, weight, found.factors[channel]) < int8_error(x, weight, torch.ones(32))


def test_silent_channels_and_unseen_experts_stay() -> None:
    x, weight = outliers(5)
    x[:, [0, 9]] = 0
    weight[:, 5] = 0
    found = best(x, [weight], torch.arange(32))
    assert found.alpha > 0
    assert found.factors[[0, 9]].tolist() == [1, 1]
    assert bool(found.factors.isfinite().all())
    assert best(x[:0], [weight], torch.arange(32)).alpha == 0
    assert best(x * 0, [weight], torch.arange(32)).alpha == 0


@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_factors_stay_where_float32_takes_them(seed: int, exponent: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(20, 6, generator=generator)
    x[:, 2] *= 10.0**exponent
    found = best(x, [torch.randn(4, 6, generator=generator)], torch.arange(6))
    assert float(found.factors.min()) >= SMALLEST
    assert float(found.factors.max()) <= LARGEST


def test_apply_scales_rows_and_columns() -> None:
    smoothing = Smoothing(
        {"w": torch.tensor([2.0, 3.0]), "b": torch.tensor([2.0, 3.0])}, {"w": torch.tensor([5.0, 7, 11])}
    )
    ones = torch.ones(2, 3)
    assert smoothing.apply("w", ones).tolist() == [[10, 14, 22], [15, 21, 33]]
    assert smoothing.apply("w", ones[1:], first_row=1).tolist() == [[15, 21, 33]]
    assert smoothing.apply("b", torch.ones(2)).tolist() == [2, 3]
    assert smoothing.apply("elsewhere", ones) is ones
    assert Smoothing.none().apply("w", ones) is ones


def test_hash_is_of_the_content() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([4.0])
    made = Smoothing({"a": one, "b": two}, {})
    assert made.sha256 == Smoothing({"b": two.clone(), "a": one.clone()}, {}).sha256
    others = [Smoothing({"a": one}, {"b": two}), Smoothing({"a": two, "b": one}, {}), Smoothing.none()]
    assert len({made.sha256, *(other.sha256 for other in others)}) == 4
    written = b"rows a 2\n" + struct.pack("<2f", 1, 2) + b"rows b 1\n" + struct.pack("<f", 4)
    assert made.sha256 == hashlib.sha256(written).hexdigest()


@pytest.mark.parametrize(("rows", "most", "first"), [(5, 8, [0, 1, 2]), (9, 4, [0, 3, 6]), (1000, 3, [0, 334, 668])])
def test_evenly_spread_rows(rows: int, most: int, first: list[int]) -> None:
    picked = evenly(torch.arange(rows), most)
    assert picked.shape[0] <= most
    assert picked[:3].tolist() == first
