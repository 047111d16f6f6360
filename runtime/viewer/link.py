"""One connection to the server's requests endpoint, for many conversations at once."""

import asyncio
import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator

import msgspec
import zmq
import zmq.asyncio

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.endpoints import connect
from sonoedge.runtime.key_files import ClientKeys
from sonoedge.runtime.protocol import Error, Id, ProtocolError, Reply, Request, decode_reply, encode
from sonoedge.runtime.viewer.clock import now_ms

CONNECT_S = 0.5  # how long a request waits for a server to be there


def connect_async(kind: int, endpoint: str, keys: ClientKeys | None, **options: int) -> zmq.asyncio.Socket:
    """Connect a socket that is awaited; raises SonoEdgeError for a wrong endpoint.

    It is made by an asyncio context: one wrapped around a plain socket would have two owners that close it.
    """
    sock = connect(kind, endpoint, keys, zmq.asyncio.Context.shadow(zmq.Context.instance()), **options)
    assert isinstance(sock, zmq.asyncio.Socket)
    return sock


class Heard(msgspec.Struct, frozen=True):
    """A reply and when it came, which may be long before somebody reads it."""

    reply: Reply
    at_ms: float


class Link:
    """Sends requests and hands each reply to whoever waits for its id; asyncio only, on one loop."""

    def __init__(self, endpoint: str, keys: ClientKeys | None = None) -> None:
        """Connect; raises SonoEdgeError for a wrong endpoint."""
        self.endpoint = endpoint
        # IMMEDIATE: what is sent while no server is there is refused, not kept for the next one.
        self._socket = connect_async(zmq.DEALER, endpoint, keys, IMMEDIATE=1)
        self._waiting: dict[Id, asyncio.Queue[Heard | ProtocolError]] = {}
        self._ids = (f"{uuid.uuid4().hex[:8]}-{number}" for number in itertools.count())

    def new_id(self) -> str:
        """Return an id that no other request of this link has."""
        return next(self._ids)

    async def run(self) -> None:
        """Hand out replies until cancelled, then disconnect."""
        try:
            while True:
                payload = await self._socket.recv()
                try:
                    reply = decode_reply(payload)
                except ProtocolError as error:
                    for queue in self._waiting.values():
                        queue.put_nowait(error)
                    continue
                if reply.id in self._waiting:
                    self._waiting[reply.id].put_nowait(Heard(reply, now_ms()))
        finally:
            self._socket.close()

    async def send(self, request: Request) -> None:
        """Send; raises SonoEdgeError when no server is there."""
        try:
            await asyncio.wait_for(self._socket.send(encode(request)), CONNECT_S)
        except asyncio.TimeoutError as error:  # the name that Python 3.10 has
            raise SonoEdgeError(
                f"{self.endpoint} has no server: start `sonoedge serve` there, or correct endpoint or keys"
            ) from error

    @contextlib.asynccontextmanager
    async def conversation(self, request: Request, timeout_s: float) -> AsyncIterator[AsyncIterator[Heard]]:
        """Send a request and yield its replies; raises SonoEdgeError for an id in use or `timeout_s` of silence."""
        assert request.id is not None
        if request.id in self._waiting:
            raise SonoEdgeError(f"{request.id!r} is the id of a question that is being answered: give another")
        queue: asyncio.Queue[Heard | ProtocolError] = asyncio.Queue()
        self._waiting[request.id] = queue
        try:
            await self.send(request)
            yield self._replies(queue, timeout_s)
        finally:
            del self._waiting[request.id]

    async def _replies(self, queue: "asyncio.Queue[Heard | ProtocolError]", timeout_s: float) -> AsyncIterator[Heard]:
        while True:
            try:
                heard = await asyncio.wait_for(queue.get(), timeout_s)
            except asyncio.TimeoutError as error:  # the name that Python 3.10 has
                raise SonoEdgeError(f"{self.endpoint} was silent for {timeout_s:g} s: check the server") from error
            if isinstance(heard, ProtocolError):
                raise heard
            yield heard

    async def one(self, request: Request, timeout_s: float) -> Reply:
        """Return the only reply to a request; raises SonoEdgeError when it is refused or not answered."""
        async with self.conversation(request, timeout_s) as replies:
            reply = (await anext(replies)).reply
        if isinstance(reply, Error):
            raise SonoEdgeError(reply.message)
        return reply
