"""The worker thread: it alone uses the session, for hints about the newest frame and for answers between frames."""

import threading
import time
from collections.abc import Callable

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.generate import Generation
from sonoedge.runtime.hint_engine import HintResult
from sonoedge.runtime.hint_smoothing import HintSmoother
from sonoedge.runtime.look import Look, Prompter, look_at
from sonoedge.runtime.model import Model
from sonoedge.runtime.prompt import HINT_LANGUAGE
from sonoedge.runtime.protocol import Answer, Error, Reply, Token
from sonoedge.runtime.questions import Question, QuestionQueue
from sonoedge.runtime.slot import LatestFrameSlot

ANSWER_SLICE_MS = (
    250.0  # an answer keeps the session this long before a waiting frame gets it; then its cache is refilled
)
POLL_S = 0.1


class Worker:
    """Takes frames from the slot and questions from the queue; its callbacks run on its own thread."""

    def __init__(
        self,
        model: Model,
        slot: LatestFrameSlot,
        questions: QuestionQueue,
        *,
        on_hints: Callable[[Frame, list[HintResult]], None],
        on_stale: Callable[[Frame, list[HintResult]], None],
        on_reply: Callable[[Question, Reply], None],
        on_failure: Callable[[SonoEdgeError], None],
        answer_slice_ms: float = ANSWER_SLICE_MS,
    ) -> None:
        self._model = model
        self._slot = slot
        self._questions = questions
        self._on_hints, self._on_stale, self._on_reply, self._on_failure = on_hints, on_stale, on_reply, on_failure
        self._smoother = HintSmoother(model.engine.schema)
        self._slice_ms = answer_slice_ms
        self.stages_ms: dict[str, float] = {}  # where the time of the newest frame went
        self.beats = 0  # grows while the thread gets on: with every turn and every step of an answer
        self._prompter = Prompter(model.session, model.tokenizer)
        self._look: Look | None = None  # of the newest frame that has its hints
        self._current: tuple[Question, Generation, int] | None = None  # the answer in the making, and its start in ns

    @property
    def idle(self) -> bool:
        """Whether no answer is in the making."""
        return self._current is None

    def run(self, stop: threading.Event) -> None:
        """Work until `stop`; questions that are left then get an error reply."""
        while not stop.is_set():
            self.beats += 1
            frame = self._slot.get(0 if self._current or len(self._questions) else POLL_S)
            if frame is not None:
                self._hint(frame)
            else:
                self._expire()
            self._answer(stop)
        while (question := self._current[0] if self._current else self._questions.take()) is not None:
            self._current = None
            self._finish(question, Error("the server is stopping: ask again when it is back", question.ask.id))

    def _hint(self, frame: Frame) -> None:
        if self._current:
            self._current[1].suspend()
        taken_ns = time.monotonic_ns()
        try:
            self._look = look_at(self._model.session, frame)
            looked_ns = time.monotonic_ns()
            results = self._smoother.update(frame, self._model.engine.judge(self._look))
        except SonoEdgeError as error:  # of this frame; the next may be fine
            self._on_failure(error)
        else:
            spans_ns = {"wait": taken_ns - frame.captured_ns, "look": looked_ns - taken_ns}
            spans_ns["hints"] = time.monotonic_ns() - looked_ns
            self.stages_ms = {stage: span_ns / 1e6 for stage, span_ns in spans_ns.items()}
            self._on_hints(frame, results)

    def _expire(self) -> None:
        """Take back what was said about a frame that has grown too old."""
        if self._look is not None and (stale := self._smoother.expire(time.monotonic_ns())):
            self._on_stale(self._look.frame, stale)

    def _answer(self, stop: threading.Event) -> None:
        """Go on with the current answer, or begin the next, until it ends or a frame waits and the slice is over."""
        if self._current is None and not self._begin():
            return
        assert self._current is not None
        question, generation, began_ns = self._current
        resumed_ns, until_ns = time.monotonic_ns(), None
        while generation.finish is None and not stop.is_set():
            self.beats += 1
            try:
                piece = generation.step()
            except SonoEdgeError as error:
                self._finish(question, Error(str(error), question.ask.id))
                return
            if piece and question.streams:
                self._on_reply(question, Token(question.ask.id, piece))
            now_ns = time.monotonic_ns()
            if until_ns is None:  # the first step may have had to refill the cache: use what that cost
                until_ns = now_ns + max(int(self._slice_ms * 1e6), now_ns - resumed_ns)
            if now_ns >= until_ns and self._slot.full:
                return
        if generation.finish is None:
            return
        answer = Answer(
            id=question.ask.id,
            answer=self._model.tokenizer.decode(generation.ids),
            frame=question.frame.sequence,
            age_ms=(time.monotonic_ns() - question.frame.captured_ns) / 1e6,
            model=self._model.id,
            intended_use=self._model.intended_use,
            tokens=len(generation.ids),
            ms=question.elapsed_ms(),
            finish=generation.finish,
        )
        self._finish(question, answer, (time.monotonic_ns() - began_ns) / 1e6)

    def _begin(self) -> bool:
        """Take the next question and look at its frame; False when none waits or it is refused."""
        question = self._questions.take()
        if question is None:
            return False
        began_ns = time.monotonic_ns()
        try:
            look = self._look
            if look is None or look.frame is not question.frame:
                look = look_at(self._model.session, question.frame)
            # Hints and questions share a prefix, the one that models learn; answers follow the question's language.
            language = question.ask.language or HINT_LANGUAGE
            prompt = self._prompter.question([look], question.ask.question, language)
        except SonoEdgeError as error:
            self._finish(question, Error(str(error), question.ask.id))
            return False
        generation = Generation(
            self._model.session,
            self._model.tokenizer,
            prompt,
            max_tokens=question.ask.max_tokens,
            deadline_ns=question.deadline_ns,
            cancel=question.cancel,
        )
        self._current = (question, generation, began_ns)
        return True

    def _finish(self, question: Question, reply: Reply, took_ms: float | None = None) -> None:
        self._current = None
        self._questions.finish(question, took_ms)
        self._on_reply(question, reply)
