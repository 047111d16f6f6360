"""Between the server's endpoints and the page: what is published goes onto the board, requests go over the link."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

import msgspec
import zmq

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.hints import VALID_MS, AskWhen, Text
from sonoedge.runtime.key_files import ClientKeys
from sonoedge.runtime.protocol import (
    LIVE,
    Ask,
    Broadcast,
    Cancel,
    Freeze,
    Frozen,
    Hint,
    Id,
    Picture,
    PictureRequest,
    ProtocolError,
    Reply,
    Report,
    SchemaReply,
    SchemaRequest,
    State,
    Status,
    StatusRequest,
    Telemetry,
    Token,
    decode_broadcast,
)
from sonoedge.runtime.viewer.board import Board, Counts, HintSeen, Names, ServerSeen
from sonoedge.runtime.viewer.clock import ServerClock, now_ms
from sonoedge.runtime.viewer.link import Heard, Link, connect_async

SILENT_S = 3.0  # the server publishes its state every second
REPLY_S = 2.0
ANSWER_S = 60.0  # between two tokens: a question may wait behind others
MIND_S = 0.5
STATUS_S = 2.0
PICTURE_S = 1 / 15
NOT_ASKED = "not asked"


class Shot(msgspec.Struct, frozen=True):
    """One picture and when it was captured, on the viewer's clock."""

    picture: Picture
    captured_ms: float


class Bridge:
    """Serves any number of pages from one subscription and one link; asyncio only, on one loop."""

    def __init__(self, link: Link, hints_endpoint: str, keys: ClientKeys | None = None) -> None:
        """Subscribe; raises SonoEdgeError for a wrong endpoint."""
        self.board = Board()
        self._link = link
        self._hints_endpoint = hints_endpoint
        self._sub = connect_async(zmq.SUB, hints_endpoint, keys)
        self._sub.subscribe(b"")
        self._clock = ServerClock()
        self._heard_s = float("-inf")
        self._problem: str | None = None  # of what is published
        self._said_model: str | None = None  # who publishes
        self._said_source: str | None = None
        self._status: Status | None = None  # the newest
        self._texts: dict[str, dict[str, Text]] = {}  # of each hint's candidates
        self._asked_when: dict[str, AskWhen] = {}  # of each hint that depends on another
        self._texts_of: str | None = None  # the model whose hints they are
        self._pull: asyncio.Task[Shot] | None = None  # the newest picture, or the one that is on its way
        self._pulled_ms = float("-inf")
        self._kept: set[str] = set()  # names of frozen pictures

    async def run(self) -> None:
        """Keep the board up to date until cancelled; then release what was frozen, and disconnect."""
        works = (self._link.run(), self._listen(), self._mind(), self._introduce())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # none ends, unless it breaks
        finally:
            releases = (self.freeze(name, release=True) for name in self._kept)
            await asyncio.gather(*releases, return_exceptions=True)
            ending = [*tasks, *([] if self._pull is None else [self._pull])]
            for ended in ending:
                ended.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            self._sub.close()

    async def picture(self) -> Shot:
        """Return the newest picture; at most 15 are fetched a second, for all pages together.

        Raises SonoEdgeError when the server refuses or is silent.
        """
        if self._pull is None or self._pull.done():
            self._pull = asyncio.create_task(self._next())
        return await asyncio.shield(self._pull)  # who leaves does not take it from the others

    async def _next(self) -> Shot:
        await asyncio.sleep(max(0.0, PICTURE_S - (now_ms() - self._pulled_ms) / 1000))
        self._pulled_ms = now_ms()
        return await self._fetch(LIVE)

    async def frozen_picture(self, name: str) -> Shot:
        """Return a frozen picture; raises SonoEdgeError when there is none of that name."""
        return await self._fetch(name)

    async def _fetch(self, name: str) -> Shot:
        sent_ms = now_ms()
        reply = await self._link.one(PictureRequest(self._link.new_id(), name=name), REPLY_S)
        if not isinstance(reply, Picture):
            raise SonoEdgeError(f"the server answered a picture request with {type(reply).__name__}: update it")
        # From the sending on: a picture may look older than it is by its way here, never younger.
        return Shot(reply, sent_ms - reply.age_ms)

    async def freeze(self, name: str, *, release: bool) -> Frozen:
        """Keep the newest frame under a name, or let it go; raises SonoEdgeError when the server refuses."""
        reply = await self._link.one(Freeze(self._link.new_id(), name, release), REPLY_S)
        if not isinstance(reply, Frozen):
            raise SonoEdgeError(f"the server answered a freeze request with {type(reply).__name__}: update it")
        (self._kept.discard if release else self._kept.add)(name)
        return reply

    async def ask(self, request: Ask | Report) -> AsyncGenerator[Heard, None]:
        """Yield the replies to a question or report; leaving early cancels it; raises SonoEdgeError for silence."""
        last: Reply | None = None
        async with self._link.conversation(request, ANSWER_S) as replies:
            try:
                async for heard in replies:
                    last = heard.reply
                    yield heard
                    if not isinstance(last, Token):
                        return
            finally:
                if last is None or isinstance(last, Token):
                    with contextlib.suppress(SonoEdgeError):  # it is gone, and the question with it
                        await self.cancel(request.id)

    async def cancel(self, request_id: Id) -> None:
        """End a question; its answer comes with what there is."""
        await self._link.send(Cancel(request_id))

    async def _listen(self) -> None:
        while True:
            payload = await self._sub.recv()
            try:
                message = decode_broadcast(payload)
            except ProtocolError as error:
                self._problem = str(error)
                continue
            was_silent = time.monotonic() - self._heard_s > SILENT_S
            if was_silent:
                self._clock = ServerClock()  # it may be another server
            self._heard_s, self._problem = time.monotonic(), None
            self._show(message)
            if was_silent:
                self._say()

    def _show(self, message: Broadcast) -> None:
        match message:
            case Hint():
                self._said_model = message.model
                if self._stranger() is None:
                    self._clock.heard(message.captured_ns / 1e6 + message.age_ms)
                    seen = self._seen(message)
                    self.board.put_hint(seen)
                    self._withdraw(seen, message.answer)
            case State():
                self._said_source = message.name
                self.board.put_source(message.state, message.name, message.detail)
            case Telemetry():
                self.board.put(Counts(message))

    def _stranger(self) -> str | None:
        """Return what is wrong when hints and pictures come from two servers: neither says anything about the other."""
        if self._status is None:
            return None
        here = self._status.model, self._status.source.name
        there = self._said_model or here[0], self._said_source or here[1]
        if here == there:
            return None
        return (
            f"{self._hints_endpoint} says hints of model {there[0][:12]} about {there[1]}, not those of "
            f"{self._link.endpoint}: give the --hints that belongs to it"
        )

    def _withdraw(self, seen: HintSeen, answer: str | None) -> None:
        """End the hints that are no longer asked after this answer: no kind of a lesion that is not there."""
        for name, condition in self._asked_when.items():
            if condition.hint == seen.hint and condition.answer != answer:
                gone = msgspec.structs.replace(
                    seen, hint=name, text=None, probability=None, reason=NOT_ASKED, set=(), coverage=None
                )
                self.board.put_hint(gone)
                self._withdraw(gone, None)

    def _seen(self, hint: Hint) -> HintSeen:
        silent = hint.abstain or hint.text is None
        return HintSeen(
            hint=hint.hint,
            text=None if silent else hint.text,
            probability=None if silent else hint.probability,
            reason=hint.reason if silent else None,
            set=self._set(hint),
            coverage=hint.coverage,
            frame=hint.frame,
            captured_ms=self._clock.here(hint.captured_ns / 1e6),
            valid_ms=hint.valid_ms or VALID_MS,
        )

    def _set(self, hint: Hint) -> tuple[Text, ...]:
        """Return the answers one of which is right in a share `coverage` of pictures, where that says something.

        In the order of the schema: a silent hint's best guess does not lead. One alone would be that guess, all say
        nothing.
        """
        texts = self._texts.get(hint.hint, {})
        inside = tuple(text for answer, text in texts.items() if answer in hint.set)
        return inside if hint.coverage is not None and 1 < len(inside) < len(texts) else ()

    async def _mind(self) -> None:
        """Say whether the server is there."""
        while True:
            self._say()
            await asyncio.sleep(MIND_S)

    def _say(self) -> None:
        silent = time.monotonic() - self._heard_s > SILENT_S
        detail = self._stranger()
        if silent:
            detail = self._problem or f"nothing published on {self._hints_endpoint}"
        model, intended_use = (None, None) if (known := self._status) is None else (known.model, known.intended_use)
        self.board.put(ServerSeen(detail is None, detail, model, intended_use))

    async def _introduce(self) -> None:
        """Learn, again and again, which model the server has and which hints: another server may take its place."""
        while True:
            wait_s = STATUS_S
            try:
                status = await self._link.one(StatusRequest(self._link.new_id()), REPLY_S)
                if isinstance(status, Status):
                    self._status = status
                    self._say()
                    await self._learn(status.model)
            except SonoEdgeError:
                wait_s = MIND_S  # `_say` tells when it is gone
            await asyncio.sleep(wait_s)

    async def _learn(self, model: str) -> None:
        """Learn the names of a model's hints and the words of their candidates, once."""
        if model == self._texts_of:
            return
        reply = await self._link.one(SchemaRequest(self._link.new_id()), REPLY_S)
        if isinstance(reply, SchemaReply):
            self._texts = {hint.name: {one.id: one.text for one in hint.candidates} for hint in reply.schema.hints}
            self._asked_when = {hint.name: hint.ask_when for hint in reply.schema.hints if hint.ask_when is not None}
            self._texts_of = model
            self.board.put(Names(tuple(self._texts)))
