"""What clients ask for and what they get: questions queued, frames frozen, counters and schemas told."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frozen import FrozenFrames
from sonoedge.runtime.model import Model
from sonoedge.runtime.pictures import RETRY_MS, Order, Pictures
from sonoedge.runtime.prompt import REPORT
from sonoedge.runtime.protocol import (
    LIVE,
    Ask,
    Cancel,
    Error,
    Freeze,
    Frozen,
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
from sonoedge.runtime.sight import Sight
from sonoedge.runtime.slot import LatestFrameSlot
from sonoedge.runtime.wire import Envelope
from sonoedge.runtime.worker import Worker


class Requests:
    """Answers requests, or hands them to those who will; on the I/O thread only."""

    def __init__(
        self,
        model: Model,
        slot: LatestFrameSlot,
        worker: Worker,
        questions: QuestionQueue,
        pictures: Pictures,
        *,
        state: Callable[[], State],
        telemetry: Callable[[], Telemetry],
        record: Callable[[str, Mapping[str, Any]], None],
        keep: Callable[[Sight], Mapping[str, str]],
    ) -> None:
        self._model, self._slot, self._worker = model, slot, worker
        self._questions, self._pictures = questions, pictures
        self._state, self._telemetry, self._record, self._keep = state, telemetry, record, keep
        self._frozen = FrozenFrames()

    def reply(self, envelope: Envelope, request: Request) -> Reply | None:
        """Return the reply to a request, an Error when it is refused, None when it comes later or not at all."""
        try:
            return self._reply(envelope, request)
        except SonoEdgeError as error:
            return Error(str(error), request.id)

    def _reply(self, envelope: Envelope, request: Request) -> Reply | None:
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
                    source=self._state(),
                    telemetry=self._telemetry(),
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
            age_ms=sight.age_ms,
            model=self._model.id,
            intended_use=self._model.intended_use,
        )
        about = {"captured_ns": sight.frame.captured_ns, **({} if request.release else self._keep(sight))}
        self._record("freeze", msgspec.structs.asdict(frozen) | about)
        return frozen

    def _newest(self) -> Sight:
        if self._worker.sight is None:
            raise self._no_frame()
        return self._worker.sight

    def _no_frame(self) -> SonoEdgeError:
        state = self._state()
        return SonoEdgeError(f"no frame yet: the source {state.name} is {state.state}; ask again soon")


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
