"""The worker thread: it alone uses the session, for hints about the newest frame and for answers between frames."""

import threading
import time
from collections.abc import Callable

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.answering import Answering
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.held_prefix import HeldPrefix
from sonoedge.runtime.hint_engine import HintResult, poor_frame
from sonoedge.runtime.hint_smoothing import HintSmoother
from sonoedge.runtime.look import Looks, Prompter
from sonoedge.runtime.model import Model
from sonoedge.runtime.orientation import Flip
from sonoedge.runtime.prompt import HINT_LANGUAGE
from sonoedge.runtime.protocol import Answer, Error, Reply
from sonoedge.runtime.questions import Question, QuestionQueue
from sonoedge.runtime.sight import Eye, Sight
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
        on_hints: Callable[[Sight, list[HintResult]], None],
        on_stale: Callable[[Sight, list[HintResult]], None],
        on_reply: Callable[[Question, Reply], None],
        on_failure: Callable[[SonoEdgeError], None],
        answer_slice_ms: float = ANSWER_SLICE_MS,
        flip: Flip = "auto",
    ) -> None:
        self._model = model
        self._slot = slot
        self._questions = questions
        self._on_hints, self._on_stale, self._on_reply, self._on_failure = on_hints, on_stale, on_reply, on_failure
        self._smoother = HintSmoother(model.engine.schema)
        self._slice_ms = answer_slice_ms
        self.stages_ms: dict[str, float] = {}  # where the time of the newest frame went
        self.beats = 0  # grows while the thread gets on: with every turn and every step of an answer
        self.sight: Sight | None = None  # the newest; read by others
        self._eye = Eye(flip)
        self._prompter = Prompter(model.session, model.tokenizer)
        self._looks = Looks(model.session)
        self._held = HeldPrefix()
        self._current: Answering | None = None  # the answer in the making

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
        while (question := self._current.question if self._current else self._questions.take()) is not None:
            self._current = None
            self._finish(question, Error("the server is stopping: ask again when it is back", question.ask.id))

    def _hint(self, frame: Frame) -> None:
        taken_ns = time.monotonic_ns()
        try:
            self.sight = sight = self._eye.see(frame)
            seen_ns = time.monotonic_ns()
            if sight.poor is None:
                looked_ns, results = self._judge(sight)
            else:
                looked_ns, results = seen_ns, poor_frame(self._model.engine.schema, sight.poor)
            results = self._smoother.update(sight.frame, results, time.monotonic_ns())
        except SonoEdgeError as error:  # of this frame; the next may be fine
            self._on_failure(error)
        else:
            spans_ns = {
                "wait": taken_ns - frame.captured_ns,
                "sector": seen_ns - taken_ns,
                "look": looked_ns - seen_ns,
                "hints": time.monotonic_ns() - looked_ns,
            }
            self.stages_ms = {stage: span_ns / 1e6 for stage, span_ns in spans_ns.items()}
            self._on_hints(sight, results)

    def _judge(self, sight: Sight) -> tuple[int, list[HintResult]]:
        """Ask every hint about a frame; gives when it had been looked at, and the results."""
        if self._current:
            self._current.suspend()
        self._held.forget()
        look = self._looks.newest(sight.frame)
        looked_ns = time.monotonic_ns()
        results = self._model.engine.judge(look)
        self._held.hold([look], self._prompter.prefix([look], HINT_LANGUAGE).ids)
        return looked_ns, results

    def _expire(self) -> None:
        """Take back what was said about a frame that has grown too old."""
        if self.sight is not None and (stale := self._smoother.expire(time.monotonic_ns())):
            self._on_stale(self.sight, stale)

    def _answer(self, stop: threading.Event) -> None:
        """Go on with the current answer, or begin the next, until it ends or a frame waits and the slice is over."""
        if self._current is None and not self._begin():
            return
        assert self._current is not None
        answering, question = self._current, self._current.question
        resumed_ns, until_ns = time.monotonic_ns(), None
        while not stop.is_set():
            self.beats += 1
            try:
                reply = answering.step()
            except SonoEdgeError as error:
                self._held.forget()
                self._finish(question, Error(str(error), question.ask.id))
                return
            if isinstance(reply, Answer):
                self._finish(question, reply, answering.took_ms)
                return
            if reply is not None and question.streams:
                self._on_reply(question, reply)
            now_ns = time.monotonic_ns()
            if until_ns is None:  # the first step may have had to refill the cache: use what that cost
                until_ns = now_ns + max(int(self._slice_ms * 1e6), now_ns - resumed_ns)
            if now_ns >= until_ns and self._slot.full:
                return

    def _begin(self) -> bool:
        """Take the next question and look at its frames; False when none waits or it is refused."""
        question = self._questions.take()
        if question is None:
            return False
        question = msgspec.structs.replace(question, sights=tuple(sight or self.sight for sight in question.sights))
        try:
            if len(question.seen) < len(question.sights):
                raise SonoEdgeError("no frame could be looked at yet: ask again soon")
            self._current = Answering(self._model, self._prompter, self._looks, self._held, question)
        except SonoEdgeError as error:
            self._finish(question, Error(str(error), question.ask.id))
            return False
        return True

    def _finish(self, question: Question, reply: Reply, took_ms: float | None = None) -> None:
        self._current = None
        self._questions.finish(question, took_ms)
        self._on_reply(question, reply)
