"""One system's answers to all cases, made by the code that serves: choices are scored, others written greedily."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import msgspec
import numpy as np

from sonoedge.calibration.questions import Question, Task
from sonoedge.errors import SonoEdgeError
from sonoedge.export.evaluation.cases import Case, Cases, contrast, sharpness
from sonoedge.progress import track
from sonoedge.runtime.choices import score_choices
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.generate import Finish, Generation
from sonoedge.runtime.look import Look, Prompt, Prompter, look_at
from sonoedge.runtime.prompt import HINT_LANGUAGE
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

MAX_TOKENS = 512  # of an answer


class Said(msgspec.Struct, frozen=True):
    """One answer; of a choice, every candidate's probability in their order, and the index of the likeliest."""

    text: str
    finish: Finish
    chosen: int | None = None
    probabilities: tuple[float, ...] = ()
    turns_left_out: int = 0  # the earliest ones, which did not fit the context


class Seen(msgspec.Struct, frozen=True):
    """What is kept of a case once it was answered: everything but its pictures."""

    name: str
    questions: tuple[Question, ...]
    region: str | None
    quality: str | None
    contrast: float
    sharpness: float


class Answered(msgspec.Struct, frozen=True):
    """All cases with one system's answers, question by question."""

    cases: tuple[Seen, ...]
    said: tuple[tuple[Said, ...], ...]


def answer_all(session: Session, tokenizer: Tokenizer, cases: Cases, label: str) -> Answered:
    """Ask every question of every case; raises SonoEdgeError naming a case whose question does not fit the context."""
    answerer = _Answerer(session, tokenizer)
    seen, said = [], []
    with track(label, len(cases)) as advance:
        for index in range(len(cases)):
            case = cases[index]
            try:
                said.append(answerer.case(case))
            except SonoEdgeError as error:
                raise SonoEdgeError(f"{case.name}: {error}") from error
            first = case.images[0]
            seen.append(Seen(case.name, case.questions, case.region, case.quality, contrast(first), sharpness(first)))
            advance(1)
    return Answered(tuple(seen), tuple(said))


class _Answerer:
    """A session that answers the questions of one case after the other, the pictures of each encoded once."""

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self._session, self._tokenizer = session, tokenizer
        self._prompter = Prompter(session, tokenizer)

    def case(self, case: Case) -> tuple[Said, ...]:
        looks = tuple(look_at(self._session, Frame(image, 0, 0, None, case.name)) for image in case.images)
        shared = len(self._prompter.prefix(looks, HINT_LANGUAGE).ids)
        return tuple(
            self._answer(looks, question, held=shared if number else 0)
            for number, question in enumerate(case.questions)
        )

    def _answer(self, looks: Sequence[Look], question: Question, *, held: int) -> Said:
        prompt, left_out = self._prompt(looks, question)
        if question.task is Task.REPORT or not question.candidates:
            written = Generation(self._session, self._tokenizer, prompt, max_tokens=MAX_TOKENS, held=held)
            while written.finish is None:
                written.step()
            return Said(self._tokenizer.decode(written.ids), written.finish, turns_left_out=left_out)
        shares = score_choices(self._session, self._tokenizer, prompt, question.candidates, held=held)
        chosen = int(np.argmax(shares))
        return Said(question.candidates[chosen], "stop", chosen, tuple(float(share) for share in shares), left_out)

    def _prompt(self, looks: Sequence[Look], question: Question) -> tuple[Prompt, int]:
        """The prompt with as many of the last turns as fit the context, and how many do not."""
        for left_out in range(len(question.turns)):
            turns = question.turns[left_out:]
            with suppress(SonoEdgeError):  # too long: without the earliest turn, perhaps not
                return self._prompter.question(looks, question.text, HINT_LANGUAGE, turns), left_out
        return self._prompter.question(looks, question.text, HINT_LANGUAGE), len(question.turns)
