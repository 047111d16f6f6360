"""One running assistant: capture thread → newest frame → worker → I/O thread, and questions the other way."""

import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frozen import FrozenFrames
from sonoedge.runtime.hint_engine import HintResult
from sonoedge.runtime.key_files import ServerKeys
from sonoedge.runtime.latency import LatencyWindow
from sonoedge.runtime.model import Model
from sonoedge.runtime.orientation import Flip
from sonoedge.runtime.pictures import RETRY_MS, Order, Pictures
from sonoedge.runtime.prompt import REPORT
from sonoedge.runtime.protocol import (
    LIVE,
    Answer,
    Ask,
    Cancel,
    Error,
    Freeze,
    Frozen,
    Hint,
    Percentiles,
    PictureRequest,
    Reply,
    Report,
    Request,
    SchemaReply,
    SchemaRequest,
    State,
    Status,
    StatusRequest,
    Telemetry,
)
from sonoedge.runtime.protocol_schema import message_schema
from sonoedge.runtime.questions import Question, QuestionQueue
from sonoedge.runtime.resident import resident_bytes
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
        flip: Flip = "auto",
        step: bool = False,
    ) -> None:
        """Bind both endpoints; raises SonoEdgeError naming the one that is taken or not allowed.

        audit: gets everything that is said, refused or changes, as a kind and its fields, and must not wait. flip: as
        in `Orientation`. step: ask the source for a frame only when the last one is done with, so that none is dropped.
        """
        self.done = threading.Event()  # the source ended and everything about it was said, or something broke
        self.failure: Exception | None = None
        self._model = model
        self._source = source
        self._audit = audit
        self._step = step
        self._slot = LatestFrameSlot()
        self._questions = QuestionQueue(QUESTIONS_AT_ONCE)
        self._worker = Worker(
            model,
            self._slot,
            self._questions,
            on_hints=self._hand_over,
            on_stale=lambda sight, results: self._wire.call(lambda: self._say(sight, results)),
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
        # Written and read by the I/O thread only.
        self._latency = LatencyWindow()
        self._stages: dict[str, LatencyWindow] = {}
        self._frozen = FrozenFrames()
        self._hinted = self._gated = self._failures = self._hints = self._abstentions = self._answered = 0
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
        broke = None if self.failure is None else str(self.failure)
        self._audit("stop", {"model": self._model.id, "failure": broke, **msgspec.to_builtins(self.telemetry())})

    def telemetry(self) -> Telemetry:
        """Return the counters; exact on the I/O thread and after `stop`."""
        p50, p95, p99 = self._latency.percentiles()
        return Telemetry(
            frames=self._slot.received,
            dropped=self._slot.dropped,
            hinted=self._hinted,
            failed=self._failures,
            hints=self._hints,
            questions=self._answered,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            abstentions=self._abstentions,
            stages=self._stage_percentiles(),
            resident_bytes=resident_bytes(),
            gated=self._gated,
        )

    def _stage_percentiles(self) -> dict[str, Percentiles]:
        found: dict[str, Percentiles] = {}
        for stage, window in list(self._stages.items()):
            match window.percentiles():
                case (float(p50), float(p95), float(p99)):
                    found[stage] = Percentiles(p50, p95, p99)
        return found

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
        self._wire.call(lambda: self._publish(sight, results, stages_ms))

    # The rest runs on the I/O thread.

    def _request(self, envelope: Envelope, request: Request) -> None:
        try:
            reply = self._reply_to(envelope, request)
        except SonoEdgeError as error:
            reply = Error(str(error), request.id)
        if reply is not None:
            self._send(envelope, reply)

    def _reply_to(self, envelope: Envelope, request: Request) -> Reply | None:
        """Return the reply to a request, None when it comes later; raises SonoEdgeError when it is refused."""
        match request:
            case Ask():
                return self._queue(envelope, request)
            case Report():
                return self._queue(envelope, _as_question(request))
            case Cancel():
                if not self._questions.cancel(envelope.client, request.id):
                    raise SonoEdgeError(
                        f"there is no question {request.id!r} to cancel: it has been answered or was never asked"
                    )
                return None
            case Freeze():
                return self._freeze(request)
            case StatusRequest():
                return Status(
                    id=request.id,
                    model=self._model.id,
                    intended_use=self._model.intended_use,
                    source=self.state(),
                    telemetry=self.telemetry(),
                    queued=len(self._questions),
                    frozen=self._frozen.list(),
                )
            case PictureRequest():
                sight = self._newest() if request.name == LIVE else self._frozen.get(request.name)
                if self._pictures.order(Order(envelope, request.id, sight)):
                    return None
                return Error(f"busy, retry in {RETRY_MS} ms", request.id, RETRY_MS)
            case SchemaRequest():
                return SchemaReply(request.id, self._model.engine.schema, messages=message_schema())

    def _queue(self, envelope: Envelope, ask: Ask) -> Error | None:
        """Queue a question; return or raise why not."""
        if self._slot.newest is None:
            raise self._no_frame()
        if not ask.question.strip():
            raise SonoEdgeError("the question is empty: ask something about the picture")
        if ask.choices and (len(ask.choices) < 2 or len(set(ask.choices)) < len(ask.choices)):
            raise SonoEdgeError(f"the choices are {list(ask.choices)}: give two or more, each once")
        names = ask.frames or (LIVE,)
        sights = tuple(self._worker.sight if name == LIVE else self._frozen.get(name) for name in names)
        refusal = self._questions.put(Question(envelope, ask, sights, time.monotonic_ns(), threading.Event()))
        if refusal is not None:
            return Error(refusal, ask.id, self._questions.retry_ms)
        self._slot.wake()
        return None

    def _freeze(self, request: Freeze) -> Frozen:
        if request.release:
            if request.name is None:
                raise SonoEdgeError("a release needs the name of a frozen frame: a status request lists them")
            name, sight = request.name, self._frozen.release(request.name)
        else:
            sight = self._newest()
            name = self._frozen.freeze(sight, request.name)
        frozen = Frozen(
            id=request.id,
            name=name,
            released=request.release,
            frame=sight.frame.sequence,
            age_ms=_age_ms(sight),
            model=self._model.id,
            intended_use=self._model.intended_use,
        )
        self._audit("freeze", msgspec.structs.asdict(frozen) | {"captured_ns": sight.frame.captured_ns})
        return frozen

    def _newest(self) -> Sight:
        if self._worker.sight is None:
            raise self._no_frame()
        return self._worker.sight

    def _no_frame(self) -> SonoEdgeError:
        return SonoEdgeError(f"no frame yet: the source {self._source.name} is {self.state().state}; ask again soon")

    def _reply(self, question: Question, reply: Reply) -> None:
        if isinstance(reply, Answer):
            self._answered += 1
            asked = msgspec.to_builtins(question.ask)
            said = msgspec.to_builtins(reply) | {name: asked[name] for name in ("question", "turns", "choices")}
            self._audit("answer", said | {"captured_ns": [sight.frame.captured_ns for sight in question.seen]})
        self._send(question.envelope, reply)

    def _send(self, envelope: Envelope, reply: Reply) -> None:
        if isinstance(reply, Error):
            self._audit("refusal", msgspec.structs.asdict(reply))
        self._wire.reply(envelope, reply)

    def _publish(self, sight: Sight, results: list[HintResult], stages_ms: dict[str, float]) -> None:
        self._say(sight, results)
        latency_ms = _age_ms(sight)
        self._latency.record(latency_ms)
        for stage, stage_ms in {**stages_ms, "wire": latency_ms - sum(stages_ms.values())}.items():
            self._stages.setdefault(stage, LatencyWindow()).record(stage_ms)
        self._hinted += 1
        self._gated += sight.poor is not None

    def _say(self, sight: Sight, results: list[HintResult]) -> None:
        frame = sight.frame
        for result in results:
            hint = Hint(
                hint=result.hint,
                answer=result.answer,
                text=result.text,
                probability=result.probability,
                abstain=result.abstain,
                reason=result.reason,
                frame=frame.sequence,
                age_ms=_age_ms(sight),
                model=self._model.id,
                intended_use=self._model.intended_use,
                captured_ns=frame.captured_ns,
                source=frame.source,
                candidates=result.candidates,
                set=result.set,
                coverage=result.coverage,
                valid_ms=result.valid_ms,
            )
            self._wire.publish(hint)
            self._audit("hint", msgspec.structs.asdict(hint))
        self._abstentions += sum(result.abstain for result in results)
        self._hints += len(results)

    def _failed(self, error: SonoEdgeError) -> None:
        self._failures += 1
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
            self._wire.publish(self.telemetry())
            self._telemetry_due_ns = now + int(TELEMETRY_S * 1e9)
        said_everything = self._hinted + self._failures + self._slot.dropped == self._slot.received
        if state.state == "ended" and said_everything and not len(self._questions):
            self.done.set()


def _changed(said: State, state: State) -> bool:
    """Whether a state is news: how long a source has been stalled is told with the telemetry only."""
    return said.state != state.state or (state.state != "stalled" and said != state)


def _age_ms(sight: Sight) -> float:
    return (time.monotonic_ns() - sight.frame.captured_ns) / 1e6


def _as_question(report: Report) -> Ask:
    """Return the question that a report answers, behind the prefix that it shares with the hints."""
    return Ask(
        id=report.id,
        question=REPORT[report.language],
        max_tokens=report.max_tokens,
        deadline_ms=report.deadline_ms,
        stream=report.stream,
        frames=report.frames,
    )
