"""One running assistant: capture thread → newest frame → worker → I/O thread, and questions the other way."""

import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.counters import Counters
from sonoedge.runtime.hint_engine import HintResult
from sonoedge.runtime.kept_frames import keep_no_frame
from sonoedge.runtime.key_files import ServerKeys
from sonoedge.runtime.model import Model
from sonoedge.runtime.orientation import Flip
from sonoedge.runtime.pictures import Pictures
from sonoedge.runtime.protocol import Answer, Error, Reply, Request, State, Telemetry
from sonoedge.runtime.publisher import Publisher
from sonoedge.runtime.questions import Question, QuestionQueue
from sonoedge.runtime.requests import Requests
from sonoedge.runtime.sight import Sight
from sonoedge.runtime.slot import LatestFrameSlot
from sonoedge.runtime.sources import Source
from sonoedge.runtime.wire import Envelope, Wire, keep_no_record
from sonoedge.runtime.worker import ANSWER_SLICE_MS, Worker

QUESTIONS_AT_ONCE = 8
TELEMETRY_S = 1.0
STEP_POLL_S = 0.2  # how often a source that is played frame by frame looks whether to stop
JOIN_S = 6.0  # a live source may sit in a read for its timeout


class Server:
    """Serves a model on a source; `start`, then `wait` until it is over, then `stop`."""

    def __init__(
        self,
        model: Model,
        source: Source,
        *,
        bind: str,
        hints_bind: str,
        answer_slice_ms: float = ANSWER_SLICE_MS,
        security: ServerKeys | None = None,
        audit: Callable[[str, Mapping[str, object]], None] = keep_no_record,
        keep: Callable[[Sight], Mapping[str, str]] = keep_no_frame,
        flip: Flip = "auto",
        step: bool = False,
    ) -> None:
        """Bind both endpoints; raises SonoEdgeError naming the one that is taken or not allowed.

        audit: gets everything that is said, refused or changes, as a kind and its fields, and must not wait. keep: gets
        the frames that such records are about, says where each is kept, and must not wait. flip: as in `Orientation`.
        step: ask the source for a frame only when the last one is done with, so that none is dropped.
        """
        self.done = threading.Event()  # the source ended and everything about it was said, or something broke
        self.failure: Exception | None = None
        self._model = model
        self._source = source
        self._audit = audit
        self._keep = keep
        self._step = step
        self._slot = LatestFrameSlot()
        self._questions = QuestionQueue(QUESTIONS_AT_ONCE)
        self._worker = Worker(
            model,
            self._slot,
            self._questions,
            on_hints=self._hand_over,
            on_stale=lambda sight, results: self._wire.call(lambda: self._publisher.say(sight, results)),
            on_reply=lambda question, reply: self._wire.call(lambda: self._reply(question, reply)),
            on_failure=lambda error: self._wire.call(lambda: self._failed(error)),
            answer_slice_ms=answer_slice_ms,
            flip=flip,
        )
        self._pictures = Pictures(
            model, lambda envelope, picture: self._wire.call(lambda: self._wire.reply(envelope, picture))
        )
        self._wire = Wire(
            bind,
            hints_bind,
            on_request=self._request,
            on_gone=lambda envelope: self._questions.cancel(envelope.client),
            on_idle=self._tick,
            security=security,
            audit=audit,
        )
        self.requests_endpoint = self._wire.requests_endpoint
        self.hints_endpoint = self._wire.hints_endpoint
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._guard, args=(self._capture,), name="capture", daemon=True),
            threading.Thread(target=self._guard, args=(lambda: self._worker.run(self._stop),), name="worker"),
            threading.Thread(target=self._guard, args=(lambda: self._pictures.run(self._stop),), name="pictures"),
        ]
        self._wire_thread = threading.Thread(target=self._guard, args=(self._wire.run,), name="wire")
        # Used by the I/O thread only.
        self._counters = Counters(self._slot)
        self._publisher = Publisher(model, self._wire, self._counters, audit, keep)
        self._requests = Requests(
            model,
            self._slot,
            self._worker,
            self._questions,
            self._pictures,
            state=self.state,
            telemetry=self._counters.telemetry,
            record=audit,
            keep=keep,
        )
        self._detail: str | None = None
        self._said: State | None = None
        self._telemetry_due_ns = 0
        self._ticks = 0

    def start(self) -> None:
        """Begin to capture, hint and answer."""
        about = {"model": self._model.id, "intended_use": self._model.intended_use, "source": self._source.name}
        self._audit("start", {**about, "bind": self.requests_endpoint, "hints_bind": self.hints_endpoint})
        for thread in (self._wire_thread, *self._threads):
            thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the source has ended or something broke; raises what broke; False after `timeout_s`."""
        over = self.done.wait(timeout_s)
        if self.failure is not None:
            raise self.failure
        return over

    def stop(self) -> None:
        """Stop every thread, tell waiting clients, and close the sockets; only after `start`."""
        self._stop.set()
        self._source.close()
        self._slot.wake()
        for thread in self._threads:
            thread.join(JOIN_S if thread.daemon else None)
        self._wire.stop()
        self._wire_thread.join()
        self._publisher.close()
        broke = None if self.failure is None else str(self.failure)
        self._audit("stop", {"model": self._model.id, "failure": broke, **msgspec.to_builtins(self.telemetry())})

    def telemetry(self) -> Telemetry:
        """Return the counters; exact on the I/O thread and after `stop`."""
        return self._counters.telemetry()

    @property
    def beats(self) -> tuple[int, int]:
        """Turns of the I/O thread and of the worker: neither stands still while the pipeline gets on."""
        return self._ticks, self._worker.beats

    def state(self) -> State:
        """Return what the source is doing now."""
        return State(self._source.state, self._source.name, self._source.detail or self._detail)

    def _guard(self, work: Callable[[], None]) -> None:
        """Run a thread's work; what it raises ends the server and reaches `wait`."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 (handed to `wait`, which raises it)
            self.failure = self.failure or error
            self.done.set()

    def _capture(self) -> None:
        for frame in self._source:
            self._slot.put(frame)
            while self._step and not self._stop.is_set() and not self._slot.wait_wanted(STEP_POLL_S):
                pass

    def _hand_over(self, sight: Sight, results: list[HintResult]) -> None:
        """Give the worker's hints to the I/O thread, with where their time went."""
        stages_ms = self._worker.stages_ms
        self._wire.call(lambda: self._publisher.publish(sight, results, stages_ms))

    # The rest runs on the I/O thread.

    def _request(self, envelope: Envelope, request: Request) -> None:
        reply = self._requests.reply(envelope, request)
        if reply is not None:
            self._send(envelope, reply)

    def _reply(self, question: Question, reply: Reply) -> None:
        if isinstance(reply, Answer):
            self._counters.answered += 1
            asked = msgspec.to_builtins(question.ask)
            said = msgspec.to_builtins(reply) | {name: asked[name] for name in ("question", "turns", "choices")}
            seen = [{"captured_ns": sight.frame.captured_ns, **self._keep(sight)} for sight in question.seen]
            self._audit("answer", said | {"seen": seen})
        self._send(question.envelope, reply)

    def _send(self, envelope: Envelope, reply: Reply) -> None:
        if isinstance(reply, Error):
            self._audit("refusal", msgspec.structs.asdict(reply))
        self._wire.reply(envelope, reply)

    def _failed(self, error: SonoEdgeError) -> None:
        self._counters.failed += 1
        self._detail = str(error)

    def _tick(self) -> None:
        self._ticks += 1
        state, now = self.state(), time.monotonic_ns()
        due = now >= self._telemetry_due_ns
        news = self._said is None or _changed(self._said, state)
        if news:
            self._audit("state", msgspec.structs.asdict(state))
        if due or news:
            self._wire.publish(state)
            self._said = state
        if due:
            self._wire.publish(self._counters.telemetry())
            self._telemetry_due_ns = now + int(TELEMETRY_S * 1e9)
        if state.state == "ended" and self._counters.every_frame_is_told and not len(self._questions):
            self.done.set()


def _changed(said: State, state: State) -> bool:
    """Whether a state is news: how long a source has been stalled is told with the telemetry only."""
    return said.state != state.state or (state.state != "stalled" and said != state)
