"""Schemes: int8 weights are the nearest and symmetric, a row or a block at a time; plans name what has no range."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sonoedge.errors import SonoEdgeError
from sonoedge.export.scheme import BLOCK, INT8_MAX, WIDER, CacheScheme, QuantizationPlan, Scheme, quantize_weight

Floats = npt.NDArray[np.float32]
WEIGHTS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(WEIGHTS)
def test_int8_weights_are_the_nearest_and_symmetric(weight: Floats) -> None:
    int8, scale = quantize_weight(weight)
    assert int8.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == (weight.shape[0],)
    assert (scale > 0).all()
    assert int8.min() >= -INT8_MAX
    wide = scale[:, None].astype(np.float64)
    assert (np.abs(weight - int8 * wide) <= 0.5001 * wide).all()
    mirrored, same_scale = quantize_weight(-weight)
    assert np.array_equal(mirrored, -int8)
    assert np.array_equal(same_scale, scale)
    largest = np.abs(weight).max(axis=1)
    assert (np.abs(int8).max(axis=1)[largest > 1e-30] == INT8_MAX).all()
    assert not int8[largest == 0].any()


@given(WEIGHTS, st.integers(1, 13))
def test_a_block_is_quantized_as_a_row_of_its_own(weight: Floats, block: int) -> None:
    int8, scale = quantize_weight(weight, block)
    starts = range(0, weight.shape[1], block)
    assert scale.shape == (weight.shape[0], len(starts))
    for index, start in enumerate(starts):  # the last may be short
        alone, its_scale = quantize_weight(weight[:, start : start + block])
        assert np.array_equal(int8[:, start : start + block], alone)
        assert np.array_equal(scale[:, index], its_scale)


@given(WEIGHTS, st.sampled_from([None, 5]))
def test_rows_do_not_know_each_other(weight: Floats, block: int | None) -> None:
    """So a tensor may be quantized in row chunks."""
    int8, scale = quantize_weight(weight, block)
    rows = [quantize_weight(weight[row : row + 1], block) for row in range(len(weight))]
    assert np.array_equal(np.concatenate([values for values, _ in rows]), int8)
    assert np.array_equal(np.concatenate([scales for _, scales in rows]), scale)


def test_halves_go_to_the_even_level() -> None:
    int8, scale = quantize_weight(np.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32))
    assert scale.tolist() == [1.0]
    assert int8.tolist() == [[127, 0, 2, 2, 0, -2]]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("block", [None, 2])
def test_weights_that_are_not_finite_are_refused(wrong: float, block: int | None) -> None:
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = wrong
    with pytest.raises(SonoEdgeError, match="a weight is not finite"):
        quantize_weight(weight, block)


@pytest.mark.parametrize("maximum", [None, 0.0, -1.0, float("nan")])
def test_what_has_no_range_is_named(maximum: float | None) -> None:
    known = {} if maximum is None else {"lm_head": maximum, "key": maximum}
    plan = QuantizationPlan({"lm_head": Scheme.W8A8}, known, CacheScheme.INT8, known)
    asks: list[tuple[str, Callable[[str], float]]] = [("lm_head", plan.activation_scale), ("key", plan.cache_scale)]
    for name, scale in asks:
        with pytest.raises(SonoEdgeError, match=f"no range for '{name}'.*calibrate on more frames, or keep it float"):
            scale(name)


def test_a_scale_reaches_the_threshold() -> None:
    plan = QuantizationPlan({}, {"a": 254.0}, CacheScheme.INT8, {"k": 12.7})
    assert plan.activation_scale("a") == 2.0
    assert plan.cache_scale("k") == pytest.approx(0.1)


def test_schemes_from_narrow_to_wide() -> None:
    assert [scheme.value for scheme in WIDER] == ["w8a8", "w8a8-dynamic", "w8a16", "w8a16-block128", "float"]
    assert [scheme.per_channel for scheme in WIDER] == [True, True, True, False, False]
    assert [scheme.block for scheme in WIDER] == [None, None, None, BLOCK, None]
    assert BLOCK == 128
