"""What is asked about a phantom in training: its closed questions in either language, and now and then a report."""

from __future__ import annotations

import numpy as np

from sonoedge.calibration.phantom import Truth
from sonoedge.calibration.phantom_text import closed_questions, paraphrase, report
from sonoedge.export.packing import Branch

LANGUAGES = ("en", "zh")
REPORT_SHARE = 0.3
CANONICAL_SHARE = 0.5


def branches(truth: Truth, rng: np.random.Generator) -> list[Branch]:
    """The questions about one frame, each in a language drawn by `rng`, most in the wording that the hints use."""
    drawn = []
    for index in range(5):
        language = LANGUAGES[int(rng.integers(2))]
        questions = closed_questions(truth, language)
        if index < len(questions):
            question = questions[index]
            text = question.question if rng.random() < CANONICAL_SHARE else paraphrase(question.name, language, rng)
            drawn.append(Branch(text, question.answer, question.name))
    if rng.random() < REPORT_SHARE:
        question_text, answer = report(truth, LANGUAGES[int(rng.integers(2))], rng)
        drawn.append(Branch(question_text, answer))
    return drawn
