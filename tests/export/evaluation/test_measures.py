"""Scores against sacrebleu and rouge-score on whole corpora, a published example, and F1 counted by hand."""

from typing import Any

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from sonoedge.calibration.questions import Question, Task
from sonoedge.export.evaluation.answers import Said
from sonoedge.export.evaluation.measures import Measure, choice_measures, matches, open_measures, text_measures

# K. Papineni et al., "BLEU" (ACL 2002), example 1: candidate 1 against its three references
PAPINENI = "It is a guide to action which ensures that the military always obeys the commands of the party."
REFERENCES = (
    "It is a guide to action that ensures that the military will forever heed Party commands.",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
    "It is the practical guide for the army always to heed the directions of the party.",
)
TEXTS = ["Ultrasound of the liver, image quality good. No lesion is seen.", "A cyst of about 20 mm lies deep.", ""]
WANTED = [
    "Ultrasound of the liver, image quality poor. No lesion is seen.",
    "A cyst of about 25 mm lies deep on the left.",
    "No.",
]


def report(wanted: tuple[str, ...]) -> Question:
    return Question(Task.REPORT, "report", "Report.", wanted)


def said(text: str) -> Said:
    return Said(text, "stop")


def value(measures: tuple[Measure, ...], name: str) -> float:
    (found,) = [measure for measure in measures if measure.name == name]
    return found.score(found.rows.sum(axis=0))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_of_a_corpus_is_sacrebleu_s(order: int) -> None:
    found = text_measures([report((right,)) for right in WANTED], [said(text) for text in TEXTS], "en")
    assert value(found, f"BLEU-{order}") == pytest.approx(
        BLEU(max_ngram_order=order).corpus_score(TEXTS, [WANTED]).score
    )


@pytest.mark.parametrize("order", [1, 4])
def test_bleu_of_chinese_is_sacrebleu_s_by_characters(order: int) -> None:
    texts, wanted = ["左侧乳腺囊肿，边界清晰。", "未见病灶。"], ["右侧乳腺囊肿，边界清晰。", "未见明显异常。"]
    found = text_measures([report((right,)) for right in wanted], [said(text) for text in texts], "zh")
    expected = BLEU(max_ngram_order=order, tokenize="zh").corpus_score(texts, [wanted]).score
    assert value(found, f"BLEU-{order}") == pytest.approx(expected)


def test_the_published_example() -> None:
    """Papineni's modified unigram precision of candidate 1 is 17/18; here the closing stop is a token as well."""
    found = text_measures([report(REFERENCES)], [said(PAPINENI)], "en")
    assert value(found, "BLEU-1") == pytest.approx(100 * 18 / 19)
    streams: list[Any] = [[reference] for reference in REFERENCES]
    assert value(found, "BLEU-4") == pytest.approx(BLEU().corpus_score([PAPINENI], streams).score)


def test_rouge_is_the_mean_of_rouge_score_s() -> None:
    found = text_measures([report((right,)) for right in WANTED], [said(text) for text in TEXTS], "en")
    scorer = RougeScorer(["rouge1", "rougeL"])
    for name, key in (("ROUGE-1", "rouge1"), ("ROUGE-L", "rougeL")):
        each = [scorer.score(right, text)[key].fmeasure for right, text in zip(WANTED, TEXTS, strict=True)]
        assert value(found, name) == pytest.approx(100 * np.mean(each))


def test_rouge_l_of_chinese_by_hand() -> None:
    """左 侧 囊 肿 against 囊 肿 左 侧: the longest common subsequence has two of four characters."""
    assert value(text_measures([report(("囊肿左侧",))], [said("左侧囊肿")], "zh"), "ROUGE-L") == pytest.approx(50)
    assert value(text_measures([report(("囊肿左侧",))], [said("左侧囊肿")], "zh"), "ROUGE-1") == pytest.approx(100)


def choice(classes: tuple[str, ...], right: int) -> Question:
    letters = tuple("ABC"[: len(classes)])
    return Question(Task.DIAGNOSIS, "single choice", "?", (letters[right],), letters, classes, right)


def test_accuracy_and_macro_f1_by_hand() -> None:
    """Wanted x x y y z, said x y y y x: F1 of x 1/2, of y 4/5, of z 0."""
    names = ("x", "y", "z")
    shuffled = ("y", "z", "x")  # another order of the options: what a letter means counts
    asked = [choice(names, 0), choice(shuffled, 2), choice(names, 1), choice(names, 1), choice(names, 2)]
    answers = [Said("", "stop", chosen) for chosen in (0, 0, 1, 1, 0)]
    found = choice_measures(asked, answers, names)
    assert value(found, "accuracy") == pytest.approx(60)
    assert value(found, "macro-F1") == pytest.approx(100 * (1 / 2 + 4 / 5 + 0) / 3)


def test_classes_that_never_occur_do_not_count() -> None:
    found = choice_measures([choice(("x", "y", "z"), 0)], [Said("", "stop", 0)], ("x", "y", "z"))
    assert value(found, "macro-F1") == 100


def test_exact_match_overlooks_case_blanks_and_the_closing_stop() -> None:
    asked = [Question(Task.VQA, "open question", "?", (right,)) for right in ("Left", "甲状腺", "liver")]
    found = open_measures(asked, [said("left."), said("甲状腺。"), said("kidney")])
    assert value(found, "exact match") == pytest.approx(200 / 3)
    assert matches("", ("",))
    assert not matches("left side", ("left",))
