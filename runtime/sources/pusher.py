"""The sending end of a pushed feed: a device SDK's callback hands its pictures to the server in three lines."""

import secrets
import threading
import time
from types import TracebackType
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

MAX_SIDE = 8192
MAX_BYTES = 96 * 2**20  # of a picture; a larger one cuts its sender off
SENDS_WAITING = 2  # pictures that wait for a slow reader; the next one is left out
HEARTBEAT_MS = 1000

Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]
Time = Annotated[int, msgspec.Meta(gt=0)]


class PushedHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first part of a pushed message, in MessagePack; the second is the pixels, row by row.

    `sender` is any number that a sender keeps, such as its process id. `captured_ns` is of CLOCK_MONOTONIC, which both
    ends share; `device_ns` is of any clock that the device has; with neither, a picture was taken when it arrives.
    """

    sender: Annotated[int, msgspec.Meta(ge=0)]
    width: Side
    height: Side
    channels: Annotated[int, msgspec.Meta(ge=1, le=3)]  # 1 is grey, 3 is RGB
    captured_ns: Time | None = None
    device_ns: Time | None = None
    spacing_mm: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    v: Annotated[int, msgspec.Meta(ge=1, le=1)] = 1


class FramePusher:
    """Pushes pictures to `sonoedge serve --source ENDPOINT`; never blocks, so that it may be called in a callback.

    Any thread may push. The server may start later, stop and start again.
    """

    def __init__(self, endpoint: str) -> None:
        """Connect, or wait for the server in the background; raises zmq.ZMQError when `endpoint` is none."""
        self._sender = secrets.randbits(48)
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set(zmq.LINGER, 0)
        self._socket.set(zmq.SNDHWM, SENDS_WAITING)
        self._socket.set(zmq.IMMEDIATE, 1)  # old pictures must not wait for a server that is not there
        self._socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.set(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
        self._socket.connect(endpoint)

    def push(
        self,
        image: npt.NDArray[np.uint8],
        *,
        spacing_mm: float | None = None,
        captured_ns: int | None = None,
        device_ns: int | None = None,
    ) -> bool:
        """Send grey [height, width] or RGB [height, width, 3]; False when nobody takes it, and it is left out.

        captured_ns: `time.monotonic_ns()` at capture. device_ns: the time of capture on the device's own clock. With
        neither, it was taken now. Raises ValueError for a picture of another kind or size.
        """
        shape = image.shape
        if (
            image.dtype != np.uint8
            or shape[2:] not in ((), (1,), (3,))
            or not all(1 <= side <= MAX_SIDE for side in shape)
            or image.size > MAX_BYTES
        ):
            raise ValueError(
                f"the picture is {image.dtype} {list(shape)}: push uint8 [height, width] or RGB of at most "
                f"{MAX_BYTES} bytes"
            )
        if captured_ns is None and device_ns is None:
            captured_ns = time.monotonic_ns()
        header = PushedHeader(
            sender=self._sender,
            width=shape[1],
            height=shape[0],
            channels=shape[2] if len(shape) == 3 else 1,
            captured_ns=captured_ns,
            device_ns=device_ns,
            spacing_mm=spacing_mm,
        )
        parts = [msgspec.msgpack.encode(header), np.ascontiguousarray(image).tobytes()]
        try:
            with self._lock:
                self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def __enter__(self) -> "FramePusher":
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Disconnect."""
        self.close()
