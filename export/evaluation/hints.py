"""Hints as questions: what the hint engine says of phantoms, beside the answers that were written."""

from __future__ import annotations

import msgspec
import numpy as np

from sonoedge.calibration.questions import Question, Task
from sonoedge.calibration.scores import ScoredFrames
from sonoedge.export.evaluation.answers import Answered, Said
from sonoedge.runtime.hints import HintSchema


def with_hints(answered: Answered, scored: ScoredFrames, schema: HintSchema) -> Answered:
    """The answers with every hint that has a right answer as one more question of its case, in English."""
    asked = [list(case.questions) for case in answered.cases]
    said = [list(answers) for answers in answered.said]
    for name, hint in scored.hints.items():
        spec = schema.hint(name)
        texts = tuple(candidate.text.en for candidate in spec.candidates)
        for frame, scores, right in zip(hint.frames, hint.scores, hint.right, strict=True):
            shares = np.exp(scores - scores.max())
            chosen = int(scores.argmax())
            asked[frame].append(
                Question(
                    Task.VQA,
                    f"hint: {name}",
                    spec.question.en,
                    (texts[right],),
                    texts,
                    spec.candidate_ids(),
                    int(right),
                )
            )
            said[frame].append(Said(texts[chosen], "stop", chosen, tuple(map(float, shares / shares.sum()))))
    cases = tuple(
        msgspec.structs.replace(case, questions=tuple(own)) for case, own in zip(answered.cases, asked, strict=True)
    )
    return Answered(cases, tuple(map(tuple, said)))
