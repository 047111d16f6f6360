"""One question on its way to its answer: written token by token, or chosen among the given ones in one step."""

import time
from collections.abc import Sequence

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.choices import score_choices
from sonoedge.runtime.frozen import named
from sonoedge.runtime.generate import Finish, Generation
from sonoedge.runtime.held_prefix import HeldPrefix
from sonoedge.runtime.hint_engine import POOR_FRAME, UNSEEN
from sonoedge.runtime.look import Looks, Prompter
from sonoedge.runtime.model import Model
from sonoedge.runtime.prompt import HINT_LANGUAGE, LETTERS, single_choice
from sonoedge.runtime.protocol import Answer, Token
from sonoedge.runtime.questions import Question
from sonoedge.runtime.sight import Sight


class Answering:
    """Answers one question step by step; between steps the session may be used for something else after `suspend`."""

    def __init__(self, model: Model, prompter: Prompter, looks: Looks, held: HeldPrefix, question: Question) -> None:
        """Look at the question's pictures; raises SonoEdgeError when there is nothing on one, or it is all too long."""
        self.question = question
        self._model, self._held = model, held
        self._began_ns = time.monotonic_ns()
        sights = question.seen
        for sight in sights:
            if sight.empty:
                raise SonoEdgeError(
                    f"frame {sight.frame.sequence} shows nothing to ask about ({POOR_FRAME}: {sight.poor}): "
                    "ask when there is a picture"
                )
        self._looks = [looks.asked(sight.frame) for sight in sights]
        self._unseen = any(model.engine.is_unseen(look) for look in self._looks)
        self._reason = _reason(sights, unseen=self._unseen)
        ask = question.ask
        # Hints and questions share a prefix, the one that models learn; answers follow the question's language.
        language = ask.language or HINT_LANGUAGE
        words = single_choice(ask.question, ask.choices) if ask.choices else ask.question
        turns = [(turn.question, turn.answer) for turn in ask.turns]
        self._prompt = prompter.question(self._looks, words, language, turns)
        self._shared = held.shared(self._looks, prompter.prefix(self._looks, language), self._prompt)
        held.forget()
        self._generation = Generation(
            model.session,
            model.tokenizer,
            self._prompt,
            max_tokens=ask.max_tokens,
            deadline_ns=question.deadline_ns,
            cancel=question.cancel,
            held=self._shared,
        )

    @property
    def took_ms(self) -> float:
        """Milliseconds since it was begun."""
        return (time.monotonic_ns() - self._began_ns) / 1e6

    def suspend(self) -> None:
        """Say that the session's cache is about to be used by others."""
        self._generation.suspend()

    def step(self) -> Token | Answer | None:
        """Go on by one token and return what it completes; raises SonoEdgeError when the session refuses."""
        if self.question.ask.choices:
            return self._choose()
        generation = self._generation
        piece = generation.step()
        if generation.finish is not None:
            self._held.hold(self._looks, generation.cached_ids)
            text = self._model.tokenizer.decode(generation.ids)
            return self._answer(text, generation.finish, tokens=len(generation.ids))
        if not piece:
            return None
        frame, age_ms = self._about()
        return Token(
            self.question.ask.id,
            piece,
            frame=frame,
            age_ms=age_ms,
            model=self._model.id,
            intended_use=self._model.intended_use,
        )

    def _choose(self) -> Answer:
        question, choices = self.question, self.question.ask.choices
        if question.cancel.is_set():
            return self._answer("", "cancelled")
        if question.deadline_ns is not None and time.monotonic_ns() >= question.deadline_ns:
            return self._answer("", "deadline")
        session, tokenizer, letters = self._model.session, self._model.tokenizer, LETTERS[: len(choices)]
        shares = score_choices(session, tokenizer, self._prompt, letters, held=self._shared)
        self._held.hold(self._looks, self._prompt.ids)
        candidates = dict(zip(choices, map(float, shares), strict=True))
        best = "" if self._unseen else max(candidates, key=candidates.__getitem__)
        return self._answer(best, "stop", candidates=candidates, abstain=self._unseen)

    def _answer(
        self,
        text: str,
        finish: Finish,
        *,
        tokens: int = 0,
        candidates: dict[str, float] | None = None,
        abstain: bool = False,
    ) -> Answer:
        ask = self.question.ask
        frame, age_ms = self._about()
        return Answer(
            id=ask.id,
            answer=text,
            frame=frame,
            age_ms=age_ms,
            model=self._model.id,
            intended_use=self._model.intended_use,
            tokens=tokens,
            ms=self.question.elapsed_ms(),
            finish=finish,
            frames=tuple(named(name, sight) for name, sight in zip(ask.frames, self.question.seen, strict=False)),
            candidates=candidates,
            abstain=abstain,
            reason=self._reason,
        )

    def _about(self) -> tuple[int, float]:
        first = self.question.seen[0]
        return first.frame.sequence, first.age_ms


def _reason(sights: Sequence[Sight], *, unseen: bool) -> str | None:
    if unseen:
        return UNSEEN
    return next((f"{POOR_FRAME}: {sight.poor}" for sight in sights if sight.poor is not None), None)
