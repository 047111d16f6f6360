"""Questions, answers and reports: they say what the truth says, in both languages."""

import numpy as np
import pytest

from sonoedge.calibration.phantom import KINDS, REGIONS, Lesion, Truth
from sonoedge.calibration.phantom_text import (
    ReportFields,
    closed_questions,
    diagnosis,
    paraphrase,
    report,
    report_fields,
    truth_fields,
)
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.hints import load_schema

LANGUAGES = ("en", "zh")


def some_truth(seed: int) -> Truth:
    """A truth without its picture, so that hundreds cost nothing."""
    rng = np.random.default_rng(seed)
    region = str(rng.choice(REGIONS))
    quality = str(rng.choice(("good", "poor")))
    lesion = None
    if rng.random() < 0.7:
        x, y = rng.uniform(20, 200, 2)
        lesion = Lesion(
            kind=str(rng.choice(KINDS)),
            side="left" if x < 111.5 else "right",
            radius_px=20.0,
            size_mm=rng.uniform(1, 80),
            depth_mm=20.0,
            centre_px=(x, y),
        )
    return Truth(region, quality, "linear", 0.3, lesion, seed, 224)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_report_reads_back_as_its_truth(language: str) -> None:
    for seed in range(500):
        truth = some_truth(seed)
        fields = truth_fields(truth)
        for rng in (None, np.random.default_rng(seed), np.random.default_rng(seed + 1000)):
            question, text = report(truth, language, rng)
            assert question
            assert "{" not in text
            assert report_fields(text, language) == fields, text


@pytest.mark.parametrize("language", LANGUAGES)
def test_reports_are_phrased_in_several_ways(language: str) -> None:
    texts = {report(some_truth(1), language, np.random.default_rng(seed)) for seed in range(60)}
    assert len({question for question, _ in texts}) >= 4
    assert len({text for _, text in texts}) == 3


def test_sizes_are_rounded_to_five_millimetres() -> None:
    for seed in range(200):
        truth = some_truth(seed)
        size = truth_fields(truth).size_mm
        if truth.lesion is None:
            assert size is None
        else:
            assert size is not None
            assert size % 5 == 0
            assert abs(size - truth.lesion.size_mm) <= 2.5 or size == 5


def test_a_text_that_says_nothing_has_no_fields() -> None:
    empty = ReportFields(None, None, None, None, None, None, None)
    assert report_fields("Hello.", "en") == empty
    assert report_fields("你好。", "zh") == empty
    contradiction = report_fields("Region: liver or kidney. A cyst on the left, on the right, 10 mm.", "en")
    assert contradiction.region is None
    assert contradiction.side is None
    assert contradiction.size_mm == 10


@pytest.mark.parametrize("language", LANGUAGES)
def test_closed_questions_are_the_schema_s(language: str) -> None:
    schema = load_schema()
    for seed in range(100):
        truth = some_truth(seed)
        asked = closed_questions(truth, language)
        names = [hint.name for hint in schema.hints if hint.ask_when is None or truth.lesion is not None]
        assert [question.name for question in asked] == names
        for question in asked:
            hint = schema.hint(question.name)
            assert question.question == hint.question.get(language)
            assert question.candidates == tuple(candidate.text.get(language) for candidate in hint.candidates)
            assert question.candidates.index(question.answer) == hint.candidate_ids().index(question.answer_id)
        answers = {question.name: question.answer_id for question in asked}
        assert answers["region"] == truth.region
        assert answers["quality"] == truth.quality
        assert answers["finding"] == ("present" if truth.lesion else "absent")
        if truth.lesion:
            assert (answers["kind"], answers["side"]) == (truth.lesion.kind, truth.lesion.side)


@pytest.mark.parametrize("language", LANGUAGES)
def test_paraphrases_are_canonical_half_of_the_time(language: str) -> None:
    rng = np.random.default_rng(0)
    for name in ("region", "quality", "finding", "kind", "side"):
        canonical = load_schema().hint(name).question.get(language)
        drawn = [paraphrase(name, language, rng) for _ in range(600)]
        assert 0.42 < drawn.count(canonical) / len(drawn) < 0.58
        assert 4 <= len(set(drawn)) <= 6


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_diagnosis_is_answered_by_the_letter_of_the_right_option(language: str) -> None:
    kinds = load_schema().hint("kind")
    for seed in range(100):
        truth = some_truth(seed)
        choice = diagnosis(truth, language, np.random.default_rng(seed))
        option = choice.question.split(f"{choice.answer}. ")[1]
        if truth.lesion is None:
            right = {"en": "no lesion", "zh": "无病灶"}[language]
        else:
            right = next(c.text.get(language) for c in kinds.candidates if c.id == truth.lesion.kind)
        assert option.startswith(right)
        assert choice.answer in choice.candidates


def test_an_unknown_language_is_named() -> None:
    truth = some_truth(0)
    for call in (closed_questions, diagnosis, report):
        with pytest.raises(SonoEdgeError, match="'fr'"):
            call(truth, "fr")
    with pytest.raises(SonoEdgeError, match="'fr'"):
        report_fields("x", "fr")


def test_an_untrained_region_has_no_answer() -> None:
    with pytest.raises(SonoEdgeError, match="'lung'"):
        closed_questions(Truth("lung", "good", "linear", 0.3, None, 0, 224), "en")
