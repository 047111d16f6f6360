"""Observers: counts that do not depend on portions, thresholds checked by brute force and against onnxruntime's."""

import contextlib
import io

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization.calibrate import HistogramCollector
from torch import Tensor

from sonoedge.calibration.observers import BINS, Method, make_observer
from sonoedge.calibration.thresholds import squared_error_threshold
from sonoedge.errors import SonoEdgeError

METHODS: tuple[Method, ...] = ("min-max", "percentile", "entropy", "mse")
HISTOGRAMS = METHODS[1:]

portions = st.lists(st.lists(st.floats(-1e4, 1e4, width=32), max_size=30), max_size=5)


def threshold(method: Method, *values: Tensor, percentile: float = 99.99) -> float:
    observer = make_observer(method, percentile)
    for portion in values:
        observer.update(portion)
    return observer.threshold()


def heavy_tails(kind: str, count: int = 100_000) -> Tensor:
    """Samples as activations have them: most small, a few large."""
    generator = torch.Generator().manual_seed(4)
    normal = torch.randn(count, generator=generator)
    other = torch.randn(count, generator=generator)
    match kind:
        case "normal":
            return normal
        case "laplace":
            return normal.sign() * -torch.rand(count, generator=generator).log()
        case "t3":
            return normal / (torch.randn(count, 3, generator=generator).square().mean(1)).sqrt()
        case "log-normal":
            return normal.exp() * other.sign()
        case "gated":
            return torch.nn.functional.silu(normal) * other
        case "outlier":
            return torch.cat([normal, torch.tensor([30.0, -28.0, 26.0])])
    raise AssertionError(kind)


KINDS = ("normal", "laplace", "t3", "log-normal", "gated", "outlier")


def squared_error(values: Tensor, clip: float) -> float:
    """Mean squared error of symmetric int8 that clips at `clip`, value by value."""
    scale = clip / 127
    return float(((values.double() / scale).round().clamp(-127, 127) * scale - values.double()).square().mean())


@pytest.mark.parametrize("method", METHODS)
@given(values=portions)
@settings(max_examples=25)
def test_a_threshold_is_never_above_the_largest_magnitude(method: Method, values: list[list[float]]) -> None:
    found = threshold(method, *(torch.tensor(portion, dtype=torch.float32) for portion in values))
    largest = max((abs(value) for portion in values for value in portion), default=0.0)
    assert 0 <= found <= largest
    assert (found == 0) == (largest == 0)
    if method == "min-max":
        assert found == largest


@pytest.mark.parametrize("method", METHODS)
@given(values=portions, seed=st.integers(0, 2**20))
@settings(max_examples=15)
def test_portions_and_their_order_do_not_matter(method: Method, values: list[list[float]], seed: int) -> None:
    whole = torch.tensor([value for portion in values for value in portion], dtype=torch.float32)
    shuffled = whole[torch.randperm(whole.numel(), generator=torch.Generator().manual_seed(seed))]
    pieces = tuple(torch.tensor(portion, dtype=torch.float32) for portion in values)
    assert threshold(method, *pieces) == threshold(method, whole) == threshold(method, *shuffled.split(7))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [2.0**-40, 8.0])
def test_a_threshold_scales_with_the_values(method: Method, factor: float) -> None:
    values = heavy_tails("t3", 20_000)
    assert threshold(method, values * factor) == threshold(method, values) * factor


@pytest.mark.parametrize("method", METHODS)
def test_zeros_first_cost_no_resolution(method: Method) -> None:
    values = heavy_tails("laplace", 20_000) * 1e-4
    zeros = torch.zeros(10)
    assert threshold(method, zeros, values) == threshold(method, values, zeros)
    assert threshold(method, zeros) == 0


@pytest.mark.parametrize("method", HISTOGRAMS)
def test_a_large_value_after_many_small_ones_takes_its_place(method: Method) -> None:
    small, large = heavy_tails("normal", 20_000), torch.tensor([700.0])
    assert threshold(method, small, large) == threshold(method, torch.cat([large, small]))


def test_extremes_of_float32_and_half_precision_are_counted() -> None:
    for values in ([1e-45, 3e-40, 1e-38], [3e38, 1.0, 0.0], [2.0**k for k in range(-120, 120)]):
        tensor = torch.tensor(values)
        for method in HISTOGRAMS:
            assert 0 < threshold(method, tensor, percentile=100) <= float(tensor.max())
    halves = heavy_tails("normal", 5000).bfloat16()
    for method in METHODS:
        assert threshold(method, halves) == threshold(method, halves.float())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_their_product(method: Method, wrong: float) -> None:
    observer = make_observer(method, name="model.layers.3.mlp.down_proj")
    observer.update(torch.ones(3))
    with pytest.raises(SonoEdgeError, match=r"the input of model\.layers\.3\.mlp\.down_proj is not finite: check"):
        observer.update(torch.tensor([[0.0, 1.0], [wrong, 2.0]]))


def test_an_unknown_observer_is_refused() -> None:
    with pytest.raises(SonoEdgeError, match=r"calibration.observer 'median' is unknown: choose min-max, percentile"):
        make_observer("median")  # type: ignore[arg-type]  # as a recipe could have it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentiles_are_those_of_numpy(kind: str, percentile: float) -> None:
    values = heavy_tails(kind)
    magnitudes = values.abs().numpy()
    below = np.percentile(magnitudes, percentile, method="lower")
    above = np.percentile(magnitudes, percentile, method="higher")
    found = threshold("percentile", *values.split(9999), percentile=percentile)
    bin_width = 2 * float(magnitudes.max()) / BINS  # at most
    assert below - bin_width <= found <= above + bin_width
    assert threshold("percentile", values, percentile=100) == float(values.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_least_squares_is_as_good_as_trying_everything(kind: str) -> None:
    values = heavy_tails(kind)
    largest = float(values.abs().max())
    tried = min(squared_error(values, largest * share) for share in np.geomspace(2**-7, 1, 300))
    found = squared_error(values, threshold("mse", *values.split(12_345)))
    assert found <= 1.01 * tried
    assert found < squared_error(values, largest)


@given(
    shape=st.sampled_from(KINDS),
    stretch=st.floats(0.5, 2),
    count=st.integers(2000, 6000),
)
@settings(max_examples=25)
def test_least_squares_is_no_worse_than_keeping_everything(shape: str, stretch: float, count: int) -> None:
    values = heavy_tails(shape, count)
    values = values.sign() * values.abs() ** stretch
    kept = squared_error(values, float(values.abs().max()))
    assert squared_error(values, threshold("mse", values)) <= 1.01 * kept


def test_least_squares_of_evenly_filled_bins_is_the_integral() -> None:
    """One full range, no tail: keeping all of it costs step²/12 on average, and less than anything narrower."""
    assert squared_error_threshold(np.full(BINS, 3), 1 / BINS) == pytest.approx(1 - 1 / 254, abs=0.006)


def onnxruntime_threshold(method: str, values: Tensor, **options: float) -> float:
    """What onnxruntime's calibrator, which optimum uses too, makes of the same values."""
    chosen = {"num_bins": 4096, "num_quantized_bins": 255, "percentile": 99.99, **options}
    collector = HistogramCollector(method, True, scenario="same", **chosen)
    with contextlib.redirect_stdout(io.StringIO()):
        collector.collect({"x": values.numpy()})
        found: npt.NDArray[np.float32] = collector.compute_collection_result()["x"][1]
    return float(found)


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_clips_at_a_similar_percentile(kind: str) -> None:
    values = heavy_tails(kind)
    theirs = onnxruntime_threshold("percentile", values, percentile=99)
    assert abs(threshold("percentile", values, percentile=99) - theirs) <= 2 * float(values.abs().max()) / 4096


@pytest.mark.parametrize("kind", ["t3", "log-normal", "gated"])
def test_onnxruntime_clips_where_entropy_does(kind: str) -> None:
    """Its divergence has other smoothing and coarser levels at the end, and is flat: the two agree on the magnitude."""
    values = heavy_tails(kind, 30_000)
    theirs, ours = onnxruntime_threshold("entropy", values, num_bins=1024), threshold("entropy", values)
    assert 1 / 1.6 < ours / theirs < 1.6
    assert ours < 0.75 * float(values.abs().max())


def test_entropy_keeps_all_of_what_has_no_tail() -> None:
    values = torch.linspace(-1, 1, 100_001)
    assert threshold("entropy", values) == pytest.approx(1, rel=0.01)
