"""The I/O thread: it alone touches the sockets; others hand it messages through a queue and wake it."""

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping

import msgspec
import zmq

from sonoedge.runtime.curve import Door, secure_server
from sonoedge.runtime.endpoints import REQUESTS_WAITING, bind, limit
from sonoedge.runtime.key_files import ServerKeys
from sonoedge.runtime.protocol import Broadcast, Error, ProtocolError, Reply, Request, decode_request, encode
from sonoedge.runtime.rate import RateLimit

BATCH = 100  # requests read before the outgoing queue gets its turn
REQUESTS_PER_S = 100  # of one client: by its key, or else by its connection
REQUESTS_AT_ONCE = 200
REOPEN_S = 10.0  # to listen again after subscribers were turned out
IDLE_MS = 100  # between calls of `on_idle`


class Envelope(msgspec.Struct, frozen=True):
    """Where a reply goes, and whether its client speaks REQ (an empty frame before the payload)."""

    client: bytes
    delimiter: bool
    key: str | None = None  # the client's public key, where the wire has CURVE


def keep_no_record(_kind: str, _fields: Mapping[str, object]) -> None:
    """Stand in for an audit log."""


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
        security: ServerKeys | None = None,
        audit: Callable[[str, Mapping[str, object]], None] = keep_no_record,
    ) -> None:
        """Bind both endpoints; raises SonoEdgeError naming the one that is taken or not allowed.

        security: makes both speak CURVE to listed clients only, which endpoints that others can reach must do.
        audit: is told on the I/O thread which keys were refused or taken off the list.
        """
        self._on_request, self._on_gone, self._on_idle = on_request, on_gone, on_idle
        self._rate = RateLimit(REQUESTS_PER_S, REQUESTS_AT_ONCE)
        self._door: Door | None = None
        self._reopen_until: float | None = None  # subscribers are being turned out
        self._outgoing: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._pub = self._context.socket(zmq.PUB)
        self._ear, self._bell = socket.socketpair()
        self._stopping = threading.Event()
        try:
            for sock in (self._router, self._pub):
                limit(sock)
            self._router.set(zmq.RCVHWM, REQUESTS_WAITING)
            self._router.set(zmq.ROUTER_MANDATORY, 1)  # a reply to a client that left is noticed
            self._ear.setblocking(False)
            self._bell.setblocking(False)
            if security is not None:
                self._door = Door(self._context, security, audit=audit, on_removed=self._turn_out)
                secure_server(self._router, security)
                secure_server(self._pub, security)
            self.requests_endpoint = bind(self._router, requests, secured=security is not None)
            self.hints_endpoint = bind(self._pub, hints, secured=security is not None)
        except BaseException:
            self._close()
            raise

    def run(self) -> None:
        """Serve until `stop`; the sockets deliver their last messages within their linger."""
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._ear, zmq.POLLIN)
        if self._door is not None:
            poller.register(self._door.socket, zmq.POLLIN)
        try:
            while not self._stopping.is_set():
                poller.poll(IDLE_MS)
                self._mind_the_door()
                self._drain()
                for _ in range(BATCH):
                    if not self._router.poll(0):
                        break
                    self._receive(self._router.recv_multipart(copy=False))
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
        """Send a reply, unless its client is no longer on the list; I/O thread only."""
        if self._door is not None and not self._door.admits(envelope.key):
            self._on_gone(envelope)
            return
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

    def _receive(self, frames: list[zmq.Frame]) -> None:
        key = self._key(frames[-1])
        if self._door is not None and not self._door.admits(key):
            return  # a client that was taken off the list while connected
        client, *rest = (frame.bytes for frame in frames)
        delimiter = len(rest) > 1 and rest[0] == b""
        envelope = Envelope(client, delimiter, key)
        payloads = rest[1:] if delimiter else rest
        refusal: str | None = None
        retry_ms = self._rate.take(key or client, time.monotonic())
        try:
            if len(payloads) != 1:
                raise ProtocolError(f"the message has {len(payloads)} parts: send one part, after an empty one for REQ")
            request = decode_request(payloads[0])
        except ProtocolError as error:
            refusal, request_id = str(error), error.request_id
        else:
            request_id = request.id
        if retry_ms is not None:
            refusal = f"more than {REQUESTS_PER_S} requests a second: retry in {retry_ms} ms"
        if refusal is not None:
            self.reply(envelope, Error(refusal, request_id, retry_ms))
            return
        self._on_request(envelope, request)

    def _key(self, frame: zmq.Frame) -> str | None:
        """The sender's public key: what the door told libzmq, which no client can write."""
        return str(frame.get("User-Id")) if self._door is not None else None

    def _mind_the_door(self) -> None:
        """Answer handshakes and follow the list, without waiting."""
        if self._door is None:
            return
        self._door.answer()
        self._door.look()
        if self._reopen_until is not None:
            try:
                self._pub.bind(self.hints_endpoint)
            except zmq.ZMQError as error:  # the old listener closes on libzmq's thread, soon
                if error.errno != zmq.EADDRINUSE or time.monotonic() > self._reopen_until:
                    raise
                return
            self._reopen_until = None

    def _turn_out(self) -> None:
        """Cut off every subscriber, as no single one can be: those still on the list connect again by themselves."""
        if self._reopen_until is None:
            self._pub.unbind(self.hints_endpoint)
        self._reopen_until = time.monotonic() + REOPEN_S

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # many rings wait already, or the wire is closed
            self._bell.send(b"\0")

    def _close(self) -> None:
        self._router.close()
        self._pub.close()
        if self._door is not None:
            self._door.close()
        self._context.term()  # waits for the linger of both sockets
        self._ear.close()
        self._bell.close()
