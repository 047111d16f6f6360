"""What is asked in a fidelity report: frames with questions, from phantoms whose truth is known or from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.case_pictures import read_case_picture
from sonoedge.calibration.conversations import IMAGE_MARK, read_conversations
from sonoedge.calibration.phantom_text import closed_questions, report, report_phrasings, truth_fields
from sonoedge.calibration.pool import PhantomPool
from sonoedge.calibration.questions import guess_language
from sonoedge.runtime.hints import LANGUAGES, load_schema

CLOSED, REPORT, CONVERSATION = "closed", "report", "conversation"
FREE_TEXT = (REPORT, CONVERSATION)  # the tasks whose answers are texts to be scored word by word


class Asked(msgspec.Struct, frozen=True):
    """One question of a case; `truths` are wordings of the right answer, empty where it is not known."""

    task: str
    text: str
    truths: tuple[str, ...]


class Case(msgspec.Struct, frozen=True):
    """One or more pictures uint8 [H, W, 3], RGB, and what is asked about them in one language."""

    name: str
    images: tuple[npt.NDArray[np.uint8], ...]
    language: str
    asked: tuple[Asked, ...]
    hints: dict[str, int | None] = {}  # every hint that is scored, with the index of the right candidate where known


class Cases(Protocol):
    """Cases that can be drawn by index, the same each time."""

    def __len__(self) -> int:
        """How many cases there are."""
        ...

    def __getitem__(self, index: int) -> Case:
        """Case `index`."""
        ...


class PhantomCases:
    """Phantoms: all hints, one closed question and one report each, frame by frame in the other language."""

    def __init__(self, pool: PhantomPool) -> None:
        self._pool, self._schema = pool, load_schema()

    def __len__(self) -> int:
        return len(self._pool)

    def __getitem__(self, index: int) -> Case:
        frame, language = self._pool[index], LANGUAGES[index % len(LANGUAGES)]
        fields = truth_fields(frame.truth)
        closed = closed_questions(frame.truth, language)
        question = closed[index // len(LANGUAGES) % len(closed)]
        wanted, _ = report(frame.truth, language)
        hints = {hint.name: getattr(fields, hint.name) for hint in self._schema.hints}
        return Case(
            name=f"phantom {frame.truth.seed}",
            images=(frame.rgb(),),
            language=language,
            asked=(
                Asked(CLOSED, question.question, (question.answer,)),
                Asked(REPORT, wanted, report_phrasings(frame.truth, language)),
            ),
            hints={
                name: None if answer is None else self._schema.hint(name).candidate_ids().index(answer)
                for name, answer in hints.items()
            },
        )


class ConversationCases:
    """The cases of a conversation file in EchoVLM's format: every exchange is one question behind the pictures."""

    def __init__(self, path: Path, limit: int | None = None) -> None:
        """Read the file, its first `limit` cases; raises SonoEdgeError as `read_conversations` does."""
        self._cases = [case for case in read_conversations(path) if case.image][:limit]

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, index: int) -> Case:
        case = self._cases[index]
        asked = tuple(
            Asked(CONVERSATION, question.replace(IMAGE_MARK, "").strip(), (answer,))
            for question, answer in case.exchanges
        )
        return Case(
            name=str(case.id),
            images=tuple(read_case_picture(Path(path)) for path in case.image),
            language=guess_language(_joined(asked)),
            asked=asked,
        )


class PartOf:
    """Some of other cases."""

    def __init__(self, cases: Cases, picked: Sequence[int]) -> None:
        """Take the cases with the indices `picked`."""
        self._cases, self._picked = cases, picked

    def __len__(self) -> int:
        return len(self._picked)

    def __getitem__(self, index: int) -> Case:
        return self._cases[self._picked[index]]


def _joined(asked: Sequence[Asked]) -> str:
    return " ".join(question.text for question in asked)
