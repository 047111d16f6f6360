"""What a fidelity report holds, as written to `reports/fidelity.json`, and the floors of a recipe that it may miss."""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec

from sonoedge.calibration.table import RoutingRow
from sonoedge.errors import SonoEdgeError
from sonoedge.export import recipe
from sonoedge.export.fidelity.metrics import Decibels
from sonoedge.export.fidelity.preset import PinnedExperts
from sonoedge.export.fidelity.text_scores import TextScore
from sonoedge.export.scheme import Scheme
from sonoedge.export.sensitivity import Trace

TOSSUP = 0.05  # the difference of two tokens' probabilities under which a model may as well say either
SIGNIFICANT_DIGITS = 4  # more would tell of the machine: sums of floats differ in their last digits


class Histogram(msgspec.Struct, frozen=True):
    """How many tokens have a divergence from `edges_nats[i]` on and under the next edge.

    The first count also holds what is smaller, the last what is larger.
    """

    edges_nats: tuple[float, ...]
    counts: tuple[int, ...]


class Divergences(msgspec.Struct, frozen=True):
    """KL(float || variant) of next-token distributions along the float model's greedy answers, in nats."""

    tokens: int
    mean: float
    p99: float
    largest: float
    top1: float  # share of tokens with the same likeliest token
    histogram: Histogram


class Texts(msgspec.Struct, frozen=True):
    """Reports and conversations in one language; scores in points, `change` is variant minus float."""

    answers: int  # compared with the float model's
    tokenization: str
    variant_against_float: TextScore
    answers_with_truth: int
    float_against_truth: TextScore | None = None  # None: the truth of no answer is known
    variant_against_truth: TextScore | None = None
    change: TextScore | None = None


class CalibrationError(msgspec.Struct, frozen=True):
    """Expected calibration error of each hint whose right answer is known."""

    float_model: dict[str, float]  # temperature 1
    variant: dict[str, float]  # temperature 1
    recalibrated: dict[str, float] | None = None  # with the temperatures that the bundle ships


class Routing(msgspec.Struct, frozen=True):
    """Share of tokens whose set of chosen experts is the float model's."""

    overall: float  # of (token, layer) pairs
    layers: tuple[float, ...]


class Metrics(msgspec.Struct, frozen=True):
    """One variant against the float model; what is None is named in `not_measured` with the reason."""

    divergence: Divergences
    answers: dict[str, float] | None = None  # share of equal greedy answers: "overall" and by task
    answers_by_language: dict[str, float] | None = None
    # As `answers`, those counted as equal that part where the float model's lead is under TOSSUP.
    tossups_aside: dict[str, float] | None = None
    widest_parting: float | None = None  # the float model's largest lead, in probability, where an answer parts from it
    hints: dict[str, float] | None = None  # share of equal likeliest candidates: "overall" and by hint
    texts: dict[str, Texts] | None = None  # by language
    router: Routing | None = None
    image_sqnr_db: Decibels | None = None  # of the image tokens
    hidden_sqnr_db: tuple[Decibels, ...] | None = None  # of each layer's output
    calibration_error: CalibrationError | None = None
    not_measured: dict[str, str] = {}


class WorstCase(msgspec.Struct, frozen=True):
    """One question whose distributions differ most; texts are None where answers were not generated."""

    case: int  # index among the cases
    name: str
    largest_kl: float
    mean_kl: float
    question: str | None = None
    float_answer: str | None = None
    variant_answer: str | None = None
    truth: str | None = None


class Fidelity(msgspec.Struct, frozen=True):
    """The whole report; the first group is measured, the rest is what the build knows and shows beside it."""

    frames: int
    questions: int
    shipped: str  # the variant that the bundle holds; floors and worst cases are about it
    variants: dict[str, Metrics]
    worst: tuple[WorstCase, ...]
    missed: tuple[str, ...] | None = None  # floors; None: the recipe has none
    search: Trace | None = None
    schemes: dict[str, Scheme] = {}  # of every product
    routing: tuple[RoutingRow, ...] = ()  # of calibration
    reference: str = "float"  # the model that the variants are compared with
    preset: PinnedExperts | None = None  # what the build of a preset left out

    @property
    def metrics(self) -> Metrics:
        """Those of the shipped variant."""
        return self.variants[self.shipped]


def report_json(fidelity: Fidelity) -> bytes:
    """The report as JSON: keys sorted, numbers to four significant digits, the same bytes for the same report.

    Raises SonoEdgeError naming a number that is not finite.
    """
    tree = _rounded(msgspec.to_builtins(fidelity), "fidelity")
    return msgspec.json.format(msgspec.json.encode(tree, order="sorted"), indent=1) + b"\n"


def _rounded(tree: object, path: str) -> object:
    match tree:
        case float():
            if not math.isfinite(tree):
                raise SonoEdgeError(f"{path} is {tree}: keep more products float in the recipe")
            return float(f"{tree:.{SIGNIFICANT_DIGITS}g}")
        case dict():
            return {key: _rounded(value, f"{path}.{key}") for key, value in tree.items()}
        case list() | tuple():
            return [_rounded(value, f"{path}[{index}]") for index, value in enumerate(tree)]
        case _:
            return tree


def missed(fidelity: Fidelity, settings: recipe.Fidelity) -> tuple[str, ...]:
    """The floors of the recipe that the shipped variant misses, each as a sentence; what was not measured misses."""
    return tuple(_misses(fidelity.metrics, settings))


def _misses(metrics: Metrics, settings: recipe.Fidelity) -> Iterator[str]:
    absent = metrics.not_measured
    # Long texts part wherever the float model itself wavers between words; what counts is where it was sure.
    answers = None if metrics.tossups_aside is None else metrics.tossups_aside["overall"]
    router = None if metrics.router is None else metrics.router.overall
    shares = (
        ("most likely tokens agree", metrics.divergence.top1, "least_top1", settings.least_top1, ""),
        (
            "answers agree, toss-ups aside,",
            answers,
            "least_answers",
            settings.least_answers,
            absent.get("tossups_aside", ""),
        ),
        ("expert sets agree", router, "least_router", settings.least_router, absent.get("router", "")),
    )
    for label, share, key, floor, reason in shares:
        if floor is None:
            continue
        if share is None:
            yield f"{key} = {floor:g} cannot be checked, not measured: {reason}"
        elif not share >= floor:
            yield f"{label} {100 * share:.3f} %, floor {100 * floor:g} % ({key})"
    mean, largest = metrics.divergence.mean, settings.largest_kl
    if largest is not None and not mean <= largest:
        yield f"mean KL is {mean:.4g} nats, at most {largest:g} (largest_kl)"
    drops = (("BLEU-1", "bleu1", settings.largest_bleu1_drop), ("ROUGE-1", "rouge1", settings.largest_rouge1_drop))
    for label, field, limit in drops:
        if limit is None:
            continue
        scored = {language: texts for language, texts in (metrics.texts or {}).items() if texts.change is not None}
        if not scored:
            reason = absent.get("texts", "no answer has a truth to be compared with")
            yield f"largest_{field}_drop = {limit:g} cannot be checked, not measured: {reason}"
        for language, texts in scored.items():
            drop = -float(getattr(texts.change, field))
            if not drop <= limit:
                yield f"{label} in {language} drops {drop:.3g} points, at most {limit:g} (largest_{field}_drop)"
