"""The plan against figures that others published: each is predicted from the others of its class alone."""

import math

import pytest

from sonoedge.device_profiles import list_profiles, load_profile
from sonoedge.device_profiles.published import (
    AGX_ORIN,
    FIGURES,
    ORIN_NANO,
    QWEN3_30B_A3B,
    ROUTED,
    Figure,
    Stage,
    figures_of,
    fit,
)
from sonoedge.device_profiles.roofline import stage_time
from sonoedge.device_profiles.shape import weigh

TOLERANCE = 0.25
DIGITS = 0.005  # profiles give two digits
CLASSES: list[tuple[str, Stage]] = [
    ("orin", "decode"),
    ("orin", "prefill"),
    ("orin", "vision"),
    ("thor", "decode"),
    ("thor", "vision"),
]
# What this project set out to predict: model, device, tokens a second.
PROMISED = [
    ("Qwen3-VL-2B INT4", AGX_ORIN, 98.4),
    ("Qwen3-VL-8B INT4", AGX_ORIN, 32.3),
    ("Qwen2.5-VL-3B W8A16", AGX_ORIN, 45.2),
    ("Qwen3-VL-2B INT4", ORIN_NANO, 36.9),
]


def _figure(model: str, device: str, tokens_s: float) -> Figure:
    found = [f for f in FIGURES if (f.model, f.device, f.stage) == (model, device, "decode")]
    return next(f for f in found if f.tokens_s == pytest.approx(tokens_s))


def _predicted_ms(figure: Figure, others: list[Figure]) -> float:
    """With the very roofline of the plan, and an efficiency that `figure` had no part in."""
    device = load_profile(figure.device)
    mode = next(mode for mode in device.modes if figure.mode in (None, mode.name))
    share = fit(others)
    shares = (share, "unknown") if figure.stage == "decode" else (1.0, share)
    time = stage_time(figure.work, mode, of_bandwidth=shares[0], of_int8_rate=shares[1])
    assert time.expected_ms is not None
    return time.expected_ms


@pytest.mark.parametrize(("model", "device", "tokens_s"), PROMISED)
def test_decoding_is_predicted_from_the_other_figures(model: str, device: str, tokens_s: float) -> None:
    figure = _figure(model, device, tokens_s)
    others = [other for other in figures_of("orin", "decode") if other is not figure]
    predicted = 1e3 / _predicted_ms(figure, others)
    print(f"{model} on {device}: {predicted:.1f} tokens/s predicted, {tokens_s} measured")
    assert predicted == pytest.approx(tokens_s, rel=TOLERANCE)


@pytest.mark.parametrize(("model", "device", "tokens_s"), PROMISED)
def test_the_other_promised_figures_alone_suffice(model: str, device: str, tokens_s: float) -> None:
    figures = [_figure(*promised) for promised in PROMISED]
    figure = _figure(model, device, tokens_s)
    predicted = 1e3 / _predicted_ms(figure, [other for other in figures if other is not figure])
    assert predicted == pytest.approx(tokens_s, rel=TOLERANCE)


@pytest.mark.parametrize(("device_class", "stage"), CLASSES)
def test_every_figure_is_predicted_from_the_others_of_its_class(device_class: str, stage: Stage) -> None:
    figures = figures_of(device_class, stage)
    assert len(figures) >= 2
    for figure in figures:
        others = [other for other in figures if other is not figure]
        predicted = _predicted_ms(figure, others)
        print(f"{figure.model} {stage} on {figure.device}: {predicted:.1f} ms predicted, {figure.milliseconds:.1f}")
        assert predicted == pytest.approx(figure.milliseconds, rel=TOLERANCE)


def test_nothing_was_faster_than_the_limits() -> None:
    for figure in (*FIGURES, *ROUTED):
        assert 0 < figure.reached < (1 if figure.stage == "decode" else 0.5), figure  # 16 bit has half of INT8's rate
        assert "https://" in figure.source


def test_profiles_say_what_fits_all_figures_of_their_class() -> None:
    for profile in list_profiles():
        for stage in ("decode", "prefill", "vision"):
            said = getattr(profile.efficiency, stage)
            if (profile.device_class, stage) in CLASSES:
                assert said == pytest.approx(fit(figures_of(profile.device_class, stage)), abs=DIGITS), profile.id
            else:
                assert said == "unknown", profile.id


def test_the_fit_is_the_geometric_mean() -> None:
    figures = figures_of("thor", "decode")
    assert fit(figures) == pytest.approx(math.prod(f.reached for f in figures) ** (1 / len(figures)))


@pytest.mark.parametrize("figure", ROUTED)
def test_a_step_reads_the_chosen_experts_only(figure: Figure) -> None:
    """Reading all 128 experts a layer would need several times the device's bandwidth for the published speed."""
    weights = weigh(figure.shape, figure.formats)
    assert QWEN3_30B_A3B.parameters == pytest.approx(30.5e9, rel=0.01)  # as its name says
    limit_ms_of_all = figure.limit_ms * (figure.work.bytes + weights.experts * (1 - 8 / 128)) / figure.work.bytes
    assert limit_ms_of_all / figure.milliseconds > 2
    assert 0.4 < figure.reached < 1
