"""What the page's requests get, from the bridge; no word about HTTP libraries."""

import asyncio
import contextlib
import threading
import urllib.parse
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, TypeVar

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.protocol import Answer, Ask, Error, Language, Report, Token
from sonoedge.runtime.viewer.board import Event
from sonoedge.runtime.viewer.bridge import Bridge
from sonoedge.runtime.viewer.clock import now_ms
from sonoedge.runtime.viewer.link import Heard

MAX_BODY_BYTES = 32 * 1024
BEAT_S = 0.5
COALESCE_S = 0.05  # the page redraws ten times a second

PageId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Question(msgspec.Struct, frozen=True, tag_field="kind", tag="ask", forbid_unknown_fields=True):
    """A question from the page, about the frozen picture of that name or the newest one."""

    id: PageId
    question: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]
    frozen: PageId | None = None


class WantedReport(msgspec.Struct, frozen=True, tag_field="kind", tag="report", forbid_unknown_fields=True):
    """A report that the page wants."""

    id: PageId
    language: Language
    frozen: PageId | None = None


class Hold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A name for the newest picture, to keep it or to let it go."""

    name: PageId
    release: bool


class Ending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The id of a question that is no longer wanted."""

    id: PageId


class Given(msgspec.Struct, frozen=True):
    """A response: whole, or piece by piece."""

    body: bytes | AsyncIterator[bytes] = b""
    status: int = 200
    kind: str = "text/plain; charset=utf-8"
    headers: dict[str, str] = {}


Body = TypeVar("Body")


class Page:
    """Answers the page's requests; asyncio only, on the bridge's loop."""

    def __init__(self, bridge: Bridge, stopping: threading.Event) -> None:
        """`stopping` ends responses that have no end of their own."""
        self._bridge = bridge
        self._stopping = stopping

    async def events(self, _query: Mapping[str, str], _body: bytes) -> Given:
        """Tell what is new for as long as the page listens; it gets the newest of everything, never a backlog."""
        return Given(self._events(), kind="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        board = self._bridge.board
        yield _beat() + _event(board.history())
        version = 0
        while not self._stopping.is_set():
            version, events = board.newer(version)
            yield _beat() + b"".join(map(_event, events))
            await asyncio.sleep(COALESCE_S)
            await board.changed(version, BEAT_S)

    async def picture(self, query: Mapping[str, str], _body: bytes) -> Given:
        """Give the newest or a frozen picture as JPEG, 204 when the page has it; raises SonoEdgeError for none."""
        frozen = query.get("frozen")
        shot = await (self._bridge.picture() if frozen is None else self._bridge.frozen_picture(frozen))
        if query.get("after") == str(shot.picture.frame):
            return Given(status=204)
        headers = {
            "x-frame": str(shot.picture.frame),
            "x-captured-ms": f"{shot.captured_ms:.3f}",
            "x-now-ms": f"{now_ms():.3f}",
            "x-reason": urllib.parse.quote(shot.picture.reason or ""),
        }
        return Given(shot.picture.jpeg, kind="image/jpeg", headers=headers)

    async def ask(self, _query: Mapping[str, str], body: bytes) -> Given:
        """Stream the replies to a question or a report, a line of JSON each."""
        wanted = _read(body, Question | WantedReport)  # type: ignore[arg-type]
        return Given(self._replies(_request(wanted)), kind="application/x-ndjson")

    async def _replies(self, request: Ask | Report) -> AsyncIterator[bytes]:
        try:
            async with contextlib.aclosing(self._bridge.ask(request)) as replies:
                async for heard in replies:
                    yield _line(heard)
        except SonoEdgeError as error:
            yield _line(Heard(Error(str(error), request.id), now_ms()))

    async def cancel(self, _query: Mapping[str, str], body: bytes) -> Given:
        """End a question; its answer comes with what there is."""
        await self._bridge.cancel(_read(body, Ending).id)
        return Given(status=204)

    async def freeze(self, _query: Mapping[str, str], body: bytes) -> Given:
        """Keep the newest picture under a name, or let it go."""
        wanted = _read(body, Hold)
        await self._bridge.freeze(wanted.name, release=wanted.release)
        return Given(status=204)


def _read(body: bytes, kind: type[Body]) -> Body:
    if len(body) > MAX_BODY_BYTES:
        raise SonoEdgeError(f"the request has more than {MAX_BODY_BYTES} bytes: ask something shorter")
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"the page's request is wrong: {error}; reload the page") from error


def _request(wanted: Question | WantedReport) -> Ask | Report:
    frames = () if wanted.frozen is None else (wanted.frozen,)
    match wanted:
        case Question():
            return Ask(wanted.id, wanted.question, stream=True, frames=frames)
        case WantedReport():
            return Report(wanted.id, wanted.language, stream=True, frames=frames)


def _beat() -> bytes:
    """The time, before everything that refers to it."""
    return b"event: beat\ndata: %.3f\n\n" % now_ms()


def _event(event: Event) -> bytes:
    """Write an event under its own tag; JSON has no raw line breaks, so one line of data holds it."""
    return b"event: %s\ndata: %s\n\n" % (str(event.__struct_config__.tag).encode(), msgspec.json.encode(event))


def _line(heard: Heard) -> bytes:
    """Write a reply, with the time at which its frame was captured."""
    fields = msgspec.to_builtins(heard.reply)
    if isinstance(heard.reply, Token | Answer) and heard.reply.age_ms is not None:
        fields |= {"now_ms": now_ms(), "captured_ms": heard.at_ms - heard.reply.age_ms}
    return msgspec.json.encode(fields) + b"\n"
