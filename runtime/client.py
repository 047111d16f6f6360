"""The client's end: ask a server and read what it says, hint by hint or token by token."""

import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypeVar

import zmq

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.endpoints import connect
from sonoedge.runtime.key_files import ClientKeys
from sonoedge.runtime.protocol import (
    LIVE,
    Answer,
    Ask,
    Broadcast,
    Cancel,
    Error,
    Freeze,
    Frozen,
    Hint,
    Id,
    Language,
    Picture,
    PictureRequest,
    Reply,
    Report,
    Request,
    SchemaReply,
    SchemaRequest,
    State,
    Status,
    StatusRequest,
    Token,
    Turn,
    decode_broadcast,
    decode_reply,
    encode,
)

Expected = TypeVar("Expected", Frozen, Picture, SchemaReply, Status)


class Client:
    """Asks one server, one question at a time; not safe to share between threads."""

    def __init__(self, endpoint: str, *, timeout_s: float | None = 10.0, keys: ClientKeys | None = None) -> None:
        """Connect; `timeout_s` is the longest silence (None: no limit); raises SonoEdgeError for a wrong endpoint.

        keys: its own and the server's, for a server with CURVE.
        """
        self.endpoint = endpoint
        self._timeout_s = timeout_s
        self._socket = connect(zmq.DEALER, endpoint, keys)
        self._ids = (f"{uuid.uuid4().hex[:8]}-{number}" for number in itertools.count())

    def ask(
        self,
        question: str,
        *,
        language: Language | None = None,
        max_tokens: int = 256,
        deadline_ms: int | None = None,
        frames: Sequence[str] = (),
        turns: Sequence[tuple[str, str]] = (),
        choices: Sequence[str] = (),
    ) -> Iterator[Token | Answer]:
        """Yield the tokens of the answer as they come, then the whole answer.

        frames: names of frozen frames, or "live"; none is the newest. turns: questions and answers that came before.
        choices: the only answers, one of which is chosen. Raises SonoEdgeError when the server refuses or stays silent;
        leaving the iteration early cancels the question.
        """
        ask = Ask(
            id=next(self._ids),
            question=question,
            language=language,
            max_tokens=max_tokens,
            deadline_ms=deadline_ms,
            frames=tuple(frames),
            turns=tuple(Turn(*turn) for turn in turns),
            choices=tuple(choices),
        )
        return self._answers(ask)

    def report(self, language: Language, *, frames: Sequence[str] = ()) -> Iterator[Token | Answer]:
        """Yield the tokens of a report, then the whole; as `ask`."""
        return self._answers(Report(next(self._ids), language, tuple(frames)))

    def _answers(self, ask: Ask | Report) -> Iterator[Token | Answer]:
        reply: Reply | None = None
        self._send(ask)
        try:
            while not isinstance(reply, Answer):
                reply = self._receive(ask.id)
                if isinstance(reply, Token | Answer):
                    yield reply
        finally:
            if isinstance(reply, Token):
                self._send(Cancel(ask.id))

    def answer(
        self, question: str, **options: Language | int | Sequence[str] | Sequence[tuple[str, str]] | None
    ) -> Answer:
        """Return the whole answer; options and errors as for `ask`."""
        *_, last = self.ask(question, **options)  # type: ignore[arg-type]
        assert isinstance(last, Answer)
        return last

    def status(self) -> Status:
        """Return the server's counters; raises SonoEdgeError when it stays silent."""
        return self._one(StatusRequest(next(self._ids)), Status)

    def freeze(self, name: str | None = None) -> Frozen:
        """Keep the newest frame under a name, or else under its number; raises SonoEdgeError when it is refused."""
        return self._one(Freeze(next(self._ids), name), Frozen)

    def release(self, name: str) -> Frozen:
        """Let a frozen frame go; raises SonoEdgeError when there is none of that name."""
        return self._one(Freeze(next(self._ids), name, release=True), Frozen)

    def picture(self, name: str = LIVE) -> Picture:
        """Return a frame as the model sees it; raises SonoEdgeError when there is none."""
        return self._one(PictureRequest(next(self._ids), name=name), Picture)

    def schema(self) -> SchemaReply:
        """Return what hints there are and what messages look like."""
        return self._one(SchemaRequest(next(self._ids)), SchemaReply)

    def _one(self, request: Request, kind: type[Expected]) -> Expected:
        self._send(request)
        reply = self._receive(request.id)
        if not isinstance(reply, kind):
            raise SonoEdgeError(
                f"{self.endpoint} answered {type(request).__name__} with {type(reply).__name__}: update it"
            )
        return reply

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def __enter__(self) -> "Client":
        """Use as a context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Disconnect."""
        self.close()

    def _send(self, request: Request) -> None:
        try:
            self._socket.send(encode(request))
        except zmq.Again as error:  # no connection, or one that the server refused
            raise silence(self.endpoint, self._timeout_s) from error

    def _receive(self, request_id: Id | None) -> Reply:
        """Return the next reply to the request, skipping those to earlier ones."""
        began = time.monotonic()
        while True:
            left_s = None if self._timeout_s is None else max(0.0, began + self._timeout_s - time.monotonic())
            if not self._socket.poll(None if left_s is None else round(left_s * 1000)):
                raise silence(self.endpoint, self._timeout_s)
            reply = decode_reply(self._socket.recv())
            if isinstance(reply, Error) and reply.id in (request_id, None):
                raise SonoEdgeError(reply.message)
            if reply.id == request_id:
                return reply


def listen(endpoint: str, *, timeout_s: float | None, keys: ClientKeys | None = None) -> Iterator[Broadcast]:
    """Yield hints, state and telemetry; raises SonoEdgeError when `timeout_s` pass without a hint."""
    socket = connect(zmq.SUB, endpoint, keys)
    try:
        socket.subscribe(b"")
        since, state = time.monotonic(), None
        while True:
            left_s = None if timeout_s is None else max(0.001, since + timeout_s - time.monotonic())
            if socket.poll(None if left_s is None else round(left_s * 1000)):
                message = decode_broadcast(socket.recv())
                yield message
                state = message if isinstance(message, State) else state
                since = time.monotonic() if isinstance(message, Hint) else since
            if timeout_s is not None and time.monotonic() >= since + timeout_s:
                raise (
                    silence(endpoint, timeout_s)
                    if state is None
                    else SonoEdgeError(
                        f"{endpoint} had no hint for {timeout_s:g} s and its source {state.name} is {state.state}"
                        f"{f' ({state.detail})' if state.detail else ''}: check the source"
                    )
                )
    finally:
        socket.close()


def silence(endpoint: str, timeout_s: float | None) -> SonoEdgeError:
    """The error for a server that says nothing."""
    return SonoEdgeError(
        f"{endpoint} was silent for {timeout_s or 0:g} s: start `sonoedge serve`, or correct endpoint, keys or "
        "--timeout-s"
    )
