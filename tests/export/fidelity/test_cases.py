"""What is asked: phantoms with their truth, and conversations of a file."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from sonoedge.calibration.conversations import write_phantom_conversations
from sonoedge.calibration.phantom_text import closed_questions, report, truth_fields
from sonoedge.calibration.pool import PhantomPool
from sonoedge.export.fidelity.cases import ConversationCases, PhantomCases
from sonoedge.runtime.hints import load_schema


def test_phantoms_are_asked_everything_in_turn(frames: PhantomPool) -> None:
    cases = PhantomCases(frames)
    made = [cases[index] for index in range(len(cases))]
    assert len(made) == len(frames)
    assert Counter(case.language for case in made) == {"en": 12, "zh": 12}
    schema = load_schema()
    asked = set()
    for case, truth in zip(made, frames.truths, strict=True):
        closed, free = case.asked
        assert (closed.task, free.task) == ("closed", "report")
        right = {q.question: q for q in closed_questions(truth, case.language)}
        assert closed.truths == (right[closed.text].answer,)
        asked.add((case.language, right[closed.text].name))
        assert (free.text, free.truths[0]) == report(truth, case.language)
        drawn = {report(truth, case.language, np.random.default_rng(seed))[1] for seed in range(30)}
        assert set(free.truths) == drawn
        for name, index in case.hints.items():
            wanted = getattr(truth_fields(truth), name)
            assert (index is None) == (wanted is None)
            assert index is None or schema.hint(name).candidate_ids()[index] == wanted
    # Closed questions change from frame to frame, in both languages.
    for language in ("en", "zh"):
        assert {name for spoken, name in asked if spoken == language} >= {"region", "quality", "finding", "kind"}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_conversations_keep_their_language_pictures_and_truth(tmp_path: Path, language: str) -> None:
    path = write_phantom_conversations(tmp_path / "cases", range(3), [language], size=96)
    cases = ConversationCases(path, limit=2)
    assert len(cases) == 2
    case = cases[1]
    assert case.name == f"phantom-1-{language}"
    assert case.language == language
    assert [image.shape for image in case.images] == [(96, 96, 3)]
    assert case.hints == {}
    assert {asked.task for asked in case.asked} == {"conversation"}
    assert all("<image>" not in asked.text and asked.truths for asked in case.asked)
