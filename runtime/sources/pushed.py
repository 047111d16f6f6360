"""Raw frames that another program on this machine pushes over ZeroMQ; see `pusher.FramePusher` for its end."""

import time

import msgspec
import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from sonoedge.runtime.endpoints import bind
from sonoedge.runtime.sources.feed import LiveFeed, LostError, Picture
from sonoedge.runtime.sources.pusher import HEARTBEAT_MS, MAX_BYTES, PushedHeader
from sonoedge.runtime.sources.stamps import StampMapper

WAITING = 4  # frames that wait to be read, besides those at the sender
OLDEST_NS = 60_000_000_000  # a stamp that is older, or of the future, is of another clock
GONE = zmq.EVENT_DISCONNECTED
STRANGER = (  # a connection that does not speak ZeroMQ; that it is gone comes next
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_header = msgspec.msgpack.Decoder(PushedHeader)


class PushedSource(LiveFeed):
    """Binds `ipc://` and takes what one program pushes there; what a second one pushes meanwhile is left out."""

    silence_s = float("inf")  # the sockets' heartbeats tell that a sender is gone

    def __init__(self, spec: str, *, once: bool = False, fps: float | None = None) -> None:
        """Bind; raises SonoEdgeError when the endpoint is taken."""
        super().__init__(spec, once=once, fps=fps)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._closed = False
        self._connections = 0
        self._strange = False  # the last to come was a stranger
        self._sender: int | None = None  # whose frames are taken
        self._stamps = StampMapper()
        try:
            self._socket.set(zmq.LINGER, 0)
            self._socket.set(zmq.RCVHWM, WAITING)
            self._socket.set(zmq.MAXMSGSIZE, MAX_BYTES)
            self._socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            self._socket.set(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
            self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | GONE | STRANGER)
            self.endpoint = bind(self._socket, spec)
        except BaseException:
            self._context.destroy(0)
            raise
        self._linked = True
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    @property
    def detail(self) -> str | None:
        """As of every feed; before the first sender, that there is none."""
        if self._phase == "waiting":
            return f"no program has connected to {self.name} yet"
        return super().detail

    def connect(self) -> None:
        """Do nothing: the socket stays bound, and senders come and go."""

    def receive(self, wait_s: float) -> Picture | None:
        """Take the next picture that is well formed and comes from the one sender."""
        if self._socket not in dict(self._poller.poll(round(wait_s * 1000))):
            while self._monitor.poll(0):  # after the last frame of a sender that is gone
                self._count(recv_monitor_message(self._monitor)["event"])
            if self._once and self._phase == "lost":
                raise LostError(self._reason)
            return None
        parts = self._socket.recv_multipart()
        try:
            return self._read(parts)
        except ValueError as error:
            self.tell(f"a message was left out: {error}")
            return None

    def disconnect(self) -> None:
        """Close the socket, at the feed's end only."""
        if not self._closed:
            self._closed = True
            self._socket.disable_monitor()
            self._context.destroy(0)

    def _count(self, event: int) -> None:
        """Follow who comes and goes; when one of several goes, the next frame says who stayed."""
        strange, self._strange = self._strange, bool(event & STRANGER)
        if self._strange or (strange and event == GONE):
            return
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connections += 1
            if self._phase in ("waiting", "lost"):
                self.linked()
            return
        self._connections = max(0, self._connections - 1)
        self._sender = None
        if not self._connections:
            self._phase, self._reason = "lost", "the program that pushed the frames is gone"

    def _read(self, parts: list[bytes]) -> Picture:
        """Read one message; raises ValueError (msgspec's errors are) naming what is wrong with it."""
        if len(parts) != 2:
            raise ValueError(f"it has {len(parts)} parts: push a header and the pixels")
        header = _header.decode(parts[0])
        shape = (header.height, header.width, header.channels)
        if header.channels == 2 or len(parts[1]) != shape[0] * shape[1] * shape[2]:
            raise ValueError(f"it has {len(parts[1])} bytes of pixels for {shape[1]} x {shape[0]} x {shape[2]}")
        if self._sender is None or (header.sender != self._sender and self.state == "stalled"):
            self._sender, self._stamps = header.sender, StampMapper()
        if header.sender != self._sender:
            raise ValueError("a second program pushes frames as well: stop one of them")
        pixels = np.frombuffer(parts[1], np.uint8).reshape(shape)
        image = np.repeat(pixels, 3, axis=2) if header.channels == 1 else pixels
        return Picture(image, self._captured_ns(header), header.spacing_mm)

    def _captured_ns(self, header: PushedHeader) -> int:
        now_ns, stamp_ns = time.monotonic_ns(), header.captured_ns
        if stamp_ns is not None and 0 <= now_ns - stamp_ns <= OLDEST_NS:
            return stamp_ns
        if stamp_ns is not None:
            self.tell("the frames' captured_ns is not of CLOCK_MONOTONIC: push it as device_ns")
        return now_ns if header.device_ns is None else self._stamps.captured_ns(header.device_ns, now_ns)
