"""An OpenIGTLink server as a feed: its IMAGE messages, with the spacing and the time that they state."""

import select
import socket
import struct
import time
import urllib.parse
from typing import Any

import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources.feed import LiveFeed, LostError, Picture
from sonoedge.runtime.sources.regions import known_spacing_mm
from sonoedge.runtime.sources.stamps import StampMapper

PREFIX = "igtl://"
PORT = 18944  # OpenIGTLink's own
CONNECT_S = 3.0
MAX_BODY_BYTES = 128 * 2**20
VERSIONS = (1, 2, 3)  # of the header

# What pyigtl raises for a body that is not what its header says.
_MALFORMED = (ArithmeticError, KeyError, NotImplementedError, OSError, TypeError, ValueError, struct.error)


class OpenIGTLinkSource(LiveFeed):
    """The pictures that a server sends: `igtl://host:port`, or `igtl://host:port/DEVICE` for those of one device.

    pyigtl reads the messages. The socket is this feed's own, since pyigtl's client notices no server that went away.
    Source: http://openigtlink.org/developers/spec.
    """

    def __init__(self, spec: str, *, once: bool = False, fps: float | None = None) -> None:
        """Connect; raises SonoEdgeError when pyigtl is not installed or nothing answers."""
        super().__init__(spec, once=once, fps=fps)
        try:
            from pyigtl.messages import MessageBase
        except ImportError as error:
            raise SonoEdgeError(f"{spec} needs pyigtl, which is not installed: `pip install sonoedge[igtl]`") from error
        self._messages = MessageBase
        self._host, self._port, self._device = _parse(spec)
        self._socket: socket.socket | None = None
        try:
            self.connect()
        except LostError as error:
            raise SonoEdgeError(f"{error}: check that the OpenIGTLink server runs and may be reached") from error
        self.linked()

    def connect(self) -> None:
        """Connect to the server."""
        try:
            self._socket = socket.create_connection((self._host, self._port), CONNECT_S)
        except OSError as error:
            raise LostError(f"{self.name} does not answer ({error})") from error
        self._socket.setblocking(False)
        self._stamps = StampMapper()
        self._header: dict[str, Any] | None = None  # of the message whose body is being read
        self._buffer, self._filled = bytearray(self._messages.IGTL_HEADER_SIZE), 0

    def receive(self, wait_s: float) -> Picture | None:
        """Read what the server has sent, up to one whole picture."""
        assert self._socket is not None
        until = time.monotonic() + wait_s
        select.select([self._socket], [], [], wait_s)
        while True:
            while self._filled < len(self._buffer):
                try:
                    count = self._socket.recv_into(memoryview(self._buffer)[self._filled :])
                except BlockingIOError:
                    return None
                except OSError as error:
                    raise LostError(f"the connection to {self.name} broke ({error})") from error
                if count == 0:
                    raise LostError(f"{self.name} closed the connection")
                self._filled += count
            picture = self._take()
            if picture is not None or time.monotonic() > until:  # a tracker's messages may never pause
                return picture

    def disconnect(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _take(self) -> Picture | None:
        """Use the bytes that are whole now, and make room for the next."""
        whole, header = self._buffer, self._header
        self._filled = 0
        if header is None:
            self._header = header = self._read_header(bytes(whole))
            self._buffer = bytearray(header["body_size"])
            return None
        self._header, self._buffer = None, bytearray(self._messages.IGTL_HEADER_SIZE)
        if header["message_type"] != "IMAGE" or self._device not in ("", header["device_name"]):
            return None
        return self._read_image(header, bytes(whole))

    def _read_header(self, whole: bytes) -> dict[str, Any]:
        try:
            header: dict[str, Any] = self._messages.parse_header(whole)
        except UnicodeDecodeError as error:
            raise LostError(f"{self.name} sends what is not OpenIGTLink") from error
        if header["header_version"] not in VERSIONS:
            raise LostError(f"{self.name} sends what is not OpenIGTLink")
        if header["body_size"] > MAX_BODY_BYTES:
            raise LostError(f"{self.name} announces {header['body_size']} bytes, more than {MAX_BODY_BYTES}")
        return header

    def _read_image(self, header: dict[str, Any], body: bytes) -> Picture | None:
        arrived_ns = time.monotonic_ns()
        message = self._messages.create_message("IMAGE")
        try:
            message.unpack(header, body)
            image = _to_rgb(message.image)
        except _MALFORMED as error:
            self.tell(f"a picture was left out: {error}")
            return None
        stamp_ns = round(header["timestamp"] * 1e9)
        captured_ns = self._stamps.captured_ns(stamp_ns, arrived_ns) if stamp_ns > 0 else arrived_ns
        return Picture(image, captured_ns, _spacing_mm(message.ijk_to_world_matrix))


def _parse(spec: str) -> tuple[str, int, str]:
    try:
        parts = urllib.parse.urlsplit(spec)
        host, port = parts.hostname, PORT if parts.port is None else parts.port
    except ValueError:
        host, port = None, 0
    if not host or not port:
        raise SonoEdgeError(f"the source {spec} names no server: write it like {PREFIX}127.0.0.1:{PORT}")
    return host, port, urllib.parse.unquote(parts.path.strip("/"))


def _to_rgb(voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Bring [1, height, width] or [1, height, width, channels] to RGB; raises ValueError for anything else."""
    if voxels.dtype != np.uint8:
        raise ValueError(f"its pixels are {voxels.dtype}: send unsigned 8 bits")
    if voxels.shape[0] != 1 or 0 in voxels.shape:
        raise ValueError(f"it is a volume of {voxels.shape[0]} slices: send single pictures")
    picture = voxels[0]
    if picture.ndim == 2:
        return np.repeat(picture[:, :, None], 3, axis=2).astype(np.uint8)
    if picture.shape[2] not in (3, 4):
        raise ValueError(f"it has {picture.shape[2]} channels: send grey or RGB")
    return np.ascontiguousarray(picture[:, :, :3]).astype(np.uint8)


def _spacing_mm(matrix: npt.NDArray[np.floating[Any]]) -> float | None:
    """Return the pixels' size (the matrix is in mm), None when they are not square or the matrix says nothing."""
    across, down = (float(np.linalg.norm(matrix[:3, axis])) for axis in (0, 1))
    if across == down == 1.0:  # what senders that know no spacing send
        return None
    return known_spacing_mm(across) if abs(across - down) <= 0.01 * across else None
