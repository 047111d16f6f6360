"""The report as JSON, and the floors of a recipe."""

import math
from typing import Any

import msgspec
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity.result import (
    Divergences,
    Fidelity,
    Histogram,
    Metrics,
    Routing,
    Texts,
    missed,
    report_json,
)
from sonoedge.export.fidelity.text_scores import TextScore
from sonoedge.export.recipe import Fidelity as Floors


def made(**changes: Any) -> Fidelity:
    """A report with round numbers, some of its metrics changed."""
    divergence = Divergences(1000, 0.002, 0.05, 0.4, 0.991, Histogram((0.1, 1.0, 10.0), (999, 1)))
    score = TextScore(60.0, 70.0)
    change = TextScore(-0.4, -0.6)
    texts = {"en": Texts(5, "words", score, 5, score, score, change)}
    metrics = Metrics(divergence, tossups_aside={"overall": 0.982}, texts=texts, router=Routing(0.97, (0.96, 0.98)))
    metrics = msgspec.structs.replace(metrics, **changes)
    return Fidelity(500, 1000, "int8", {"int8": metrics, "cache": Metrics(divergence)}, ())


def floors(**asked: float) -> Floors:
    """A recipe that asks for nothing but these."""
    return Floors(first_frame_seed=0, frames=500, **asked)


def test_every_floor_that_is_missed_is_named_with_both_numbers() -> None:
    asked = {
        "least_top1": 0.995,
        "least_answers": 0.99,
        "least_router": 0.98,
        "largest_kl": 0.001,
        "largest_bleu1_drop": 0.3,
        "largest_rouge1_drop": 0.5,
    }
    assert missed(made(), floors(**asked)) == (
        "most likely tokens agree 99.100 %, floor 99.5 % (least_top1)",
        "answers agree, toss-ups aside, 98.200 %, floor 99 % (least_answers)",
        "expert sets agree 97.000 %, floor 98 % (least_router)",
        "mean KL is 0.002 nats, at most 0.001 (largest_kl)",
        "BLEU-1 in en drops 0.4 points, at most 0.3 (largest_bleu1_drop)",
        "ROUGE-1 in en drops 0.6 points, at most 0.5 (largest_rouge1_drop)",
    )


def test_floors_that_are_just_met_and_floors_nobody_asked_for_are_held() -> None:
    asked = {"least_top1": 0.991, "least_answers": 0.982, "least_router": 0.97, "largest_kl": 0.002}
    asked |= {"largest_bleu1_drop": 0.4, "largest_rouge1_drop": 0.6}
    assert missed(made(), floors(**asked)) == ()
    assert missed(made(), floors()) == ()


def test_what_was_not_measured_misses_its_floor() -> None:
    reasons = {"tossups_aside": "no answers", "router": "no probe", "texts": "no texts"}
    unmeasured = made(tossups_aside=None, router=None, texts=None, not_measured=reasons)
    found = missed(unmeasured, floors(least_answers=0.9, least_router=0.9, largest_bleu1_drop=1))
    assert found == (
        "least_answers = 0.9 cannot be checked, not measured: no answers",
        "least_router = 0.9 cannot be checked, not measured: no probe",
        "largest_bleu1_drop = 1 cannot be checked, not measured: no texts",
    )


def test_json_is_sorted_rounded_and_reads_back() -> None:
    report = made(router=Routing(1 / 3, (1 / 3,)), image_sqnr_db="infinite", hidden_sqnr_db=(12.34567, "infinite"))
    encoded = report_json(report)
    tree = msgspec.json.decode(encoded)
    assert list(tree) == sorted(tree)
    assert list(tree["variants"]) == ["cache", "int8"]
    assert tree["variants"]["int8"]["router"] == {"layers": [0.3333], "overall": 0.3333}
    assert tree["variants"]["int8"]["hidden_sqnr_db"] == [12.35, "infinite"]
    assert report_json(msgspec.json.decode(encoded, type=Fidelity)) == encoded


def test_a_number_that_is_not_finite_is_refused_by_name() -> None:
    with pytest.raises(SonoEdgeError, match=r"fidelity\.variants\.int8\.router\.overall is nan"):
        report_json(made(router=Routing(math.nan, (1.0,))))
