"""What is measured of answers, as rows that can be added up, so that any resample of cases is scored at once.

A measure holds one row of sufficient statistics a question and a function from their sum to the score. So an interval
over resampled cases, a difference between systems and a permutation of their answers all use one definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.questions import Question, Task
from sonoedge.export.evaluation.answers import Said
from sonoedge.export.fidelity.text_scores import ORDERS, ROUGE, bleu, text_statistics

Floats = npt.NDArray[np.float64]

ACCURACY, MACRO_F1, CHOICE_ACCURACY, EXACT_MATCH = "accuracy", "macro-F1", "choice accuracy", "exact match"
DEFINITIONS = {
    "BLEU-n": "sacrebleu, all texts together, uniform weights over 1 to n, brevity penalty, exp smoothing, 0 to 100",
    "ROUGE-1, ROUGE-L": "rouge-score, F-measure, mean over the texts, 0 to 100",
    ACCURACY: "single choices whose likeliest candidate, by the summed log-probabilities of its tokens, is right, in %",
    MACRO_F1: "mean over the classes of 2·right/(said + wanted), classes that occur in neither left out, in %",
    CHOICE_ACCURACY: "true-or-false questions and hints whose likeliest candidate is right, in %",
    EXACT_MATCH: "open questions whose written answer is a reference, case, blanks and closing punctuation aside, in %",
}


class Measure(msgspec.Struct, frozen=True):
    """One measure of some questions: statistics [n, s], and the score of a sum of them [s].

    share: the score is a percentage of right answers, the statistics being (right, 1).
    """

    name: str
    rows: Floats
    score: Callable[[Floats], float]
    share: bool = False


def text_measures(asked: Sequence[Question], said: Sequence[Said], language: str) -> tuple[Measure, ...]:
    """BLEU-1 to 4, ROUGE-1 and ROUGE-L of texts in one language."""
    pairs = zip(asked, said, strict=True)
    rows = np.array([text_statistics(answer.text, question.references, language) for question, answer in pairs])
    counts = rows[:, : 2 * ORDERS + 2]
    found = [Measure(f"BLEU-{order}", counts, _bleu(order)) for order in range(1, ORDERS + 1)]
    for index, name in enumerate(ROUGE):
        one = np.stack([rows[:, 2 * ORDERS + 2 + index], np.ones(len(rows))], axis=1)
        found.append(Measure(name.replace("rouge", "ROUGE-"), one, _percentage))
    return tuple(found)


def choice_measures(asked: Sequence[Question], said: Sequence[Said], classes: Sequence[str]) -> tuple[Measure, ...]:
    """Accuracy and, where `classes` are given, macro-F1 over them; every question has candidates."""
    right = np.array([answer.chosen == question.right for question, answer in zip(asked, said, strict=True)])
    name = ACCURACY if asked[0].task is Task.DIAGNOSIS else CHOICE_ACCURACY
    found = [_share(name, right)]
    if classes:
        wanted, told = np.zeros((2, len(asked), len(classes)))
        for row, (question, answer) in enumerate(zip(asked, said, strict=True)):
            meant = class_names(question, classes)
            wanted[row, classes.index(meant[question.right or 0])] = 1
            told[row, classes.index(meant[answer.chosen or 0])] = 1
        found.append(Measure(MACRO_F1, np.concatenate([wanted * told, wanted + told], axis=1), _macro_f1))
    return tuple(found)


def open_measures(asked: Sequence[Question], said: Sequence[Said]) -> tuple[Measure, ...]:
    """Exact match of short open answers."""
    pairs = zip(asked, said, strict=True)
    return (_share(EXACT_MATCH, np.array([matches(answer.text, question.references) for question, answer in pairs])),)


def matches(text: str, references: Sequence[str]) -> bool:
    """Whether the text is one of the references, case, blanks and closing punctuation aside."""
    return _bare(text) in {_bare(reference) for reference in references}


def class_names(question: Question, classes: Sequence[str]) -> tuple[str, ...]:
    """What the candidates of a question are called among `classes`: by what they say, else by their letter."""
    letters = tuple("ABCDEFGHIJ"[: len(question.candidates)])
    return question.classes if all(name in classes for name in question.classes) else letters


def _bare(text: str) -> str:
    return "".join(text.split()).rstrip(".。!！;；,，:：").casefold()


def _share(name: str, right: npt.NDArray[np.bool_]) -> Measure:
    return Measure(name, np.stack([right.astype(np.float64), np.ones(len(right))], axis=1), _percentage, share=True)


def _bleu(order: int) -> Callable[[Floats], float]:
    return lambda sums: bleu(sums, order)


def _percentage(sums: Floats) -> float:
    return float(100 * sums[0] / sums[1])


def _macro_f1(sums: Floats) -> float:
    hits, total = np.split(sums, 2)
    present = total > 0
    return float(100 * np.mean(2 * hits[present] / total[present]))
