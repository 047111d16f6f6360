"""The I/O thread: it alone touches the sockets; others hand it messages through a queue and wake it."""

import contextlib
import queue
import socket
import threading
from collections.abc import Callable

import msgspec
import zmq

from sonoedge.runtime.endpoints import bind, limit
from sonoedge.runtime.protocol import Broadcast, Error, ProtocolError, Reply, Request, decode_request, encode

BATCH = 100  # requests read before the outgoing queue gets its turn
IDLE_MS = 100  # between calls of `on_idle`


class Envelope(msgspec.Struct, frozen=True):
    """Where a reply goes, and whether its client speaks REQ (an empty frame before the payload)."""

    client: bytes
    delimiter: bool


class Wire:
    """Owns the ROUTER for requests and the PUB for hints; calls back on the thread that runs it.

    `on_request` gets each readable request, `on_gone` the envelope of a client that left or does not read, `on_idle` is
    called at least every 100 ms.
    """

    def __init__(
        self,
        requests: str,
        hints: str,
        *,
        on_request: Callable[[Envelope, Request], None],
        on_gone: Callable[[Envelope], object],
        on_idle: Callable[[], None],
    ) -> None:
        """Bind both endpoints; raises SonoEdgeError naming the one that is taken or not allowed."""
        self._on_request, self._on_gone, self._on_idle = on_request, on_gone, on_idle
        self._outgoing: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._pub = self._context.socket(zmq.PUB)
        self._ear, self._bell = socket.socketpair()
        self._stopping = threading.Event()
        try:
            for sock in (self._router, self._pub):
                limit(sock)
            self._router.set(zmq.ROUTER_MANDATORY, 1)  # a reply to a client that left is noticed
            self._ear.setblocking(False)
            self._bell.setblocking(False)
            self.requests_endpoint = bind(self._router, requests)
            self.hints_endpoint = bind(self._pub, hints)
        except BaseException:
            self._close()
            raise

    def run(self) -> None:
        """Serve until `stop`; the sockets deliver their last messages within their linger."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._ear, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                poller.poll(IDLE_MS)
                self._drain()
                for _ in range(BATCH):
                    if not self._router.poll(0):
                        break
                    self._receive(self._router.recv_multipart())
                self._on_idle()
            self._drain()
        finally:
            self._close()

    def stop(self) -> None:
        """Make `run` deliver what is queued, close and return; safe from any thread."""
        self._stopping.set()
        self._ring()

    def call(self, job: Callable[[], None]) -> None:
        """Run `job` on the I/O thread soon; it may use `reply` and `publish`. Safe from any thread."""
        self._outgoing.put(job)
        self._ring()

    def reply(self, envelope: Envelope, message: Reply) -> None:
        """Send a reply; I/O thread only."""
        frames = [envelope.client, b"", encode(message)] if envelope.delimiter else [envelope.client, encode(message)]
        try:
            self._router.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            self._on_gone(envelope)

    def publish(self, message: Broadcast) -> None:
        """Send to every subscriber; one that lags too far behind misses messages. I/O thread only."""
        self._pub.send(encode(message), zmq.NOBLOCK)

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._ear.recv(4096):
                pass
        while not self._outgoing.empty():
            self._outgoing.get()()

    def _receive(self, frames: list[bytes]) -> None:
        client, *rest = frames
        delimiter = len(rest) > 1 and rest[0] == b""
        envelope = Envelope(client, delimiter)
        payloads = rest[1:] if delimiter else rest
        try:
            if len(payloads) != 1:
                raise ProtocolError(f"the message has {len(payloads)} parts: send one part, after an empty one for REQ")
            request = decode_request(payloads[0])
        except ProtocolError as error:
            self.reply(envelope, Error(str(error), error.request_id))
            return
        self._on_request(envelope, request)

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # many rings wait already, or the wire is closed
            self._bell.send(b"\0")

    def _close(self) -> None:
        self._router.close()
        self._pub.close()
        self._context.term()  # waits for the linger of both sockets
        self._ear.close()
        self._bell.close()
