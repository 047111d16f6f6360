"""Reads the GStreamer Data Protocol 1.0, which `gdppay` writes: frames with their size and time through a pipe."""

import binascii
import re
import struct

import msgspec
import numpy as np
import numpy.typing as npt

HEADER_BYTES = 62
MAX_PAYLOAD_BYTES = 128 * 2**20  # a frame of 8K is 95 MiB
BUFFER, CAPS = 1, 2  # the payload types that matter here; the others are events

_HEADER = struct.Struct(">BBBxHIQ40xHH")  # version, flags, type, length, time stamp, two check sums
_NO_STAMP = 2**64 - 1
_HEADER_IS_CHECKED = 1  # of the flags


class GdpError(ValueError):
    """The bytes are not the protocol, or not a picture that is understood."""


class Packet(msgspec.Struct, frozen=True):
    """What a header announces: the payload's type and bytes, and the buffer's time (ns) when it has one."""

    type: int
    length: int
    stamp_ns: int | None


class Layout(msgspec.Struct, frozen=True):
    """Raw RGB as the caps state it; `fps` is None when they state no rate."""

    width: int
    height: int
    fps: float | None


def read_header(header: bytes) -> Packet:
    """Read 62 bytes; raises GdpError when they are damaged, of another version or too large."""
    major, _minor, flags, kind, length, stamp_ns, check, _payload_check = _HEADER.unpack(header)
    if major != 1:
        raise GdpError(f"the stream is of version {major} of the GStreamer Data Protocol, not 1")
    if flags & _HEADER_IS_CHECKED and binascii.crc_hqx(header[:58], 0xFFFF) ^ 0xFFFF != check:
        raise GdpError("a header of the stream is damaged: its check sum does not fit")
    if length > MAX_PAYLOAD_BYTES:
        raise GdpError(f"a packet of the stream has {length} bytes, more than {MAX_PAYLOAD_BYTES}")
    return Packet(kind, length, None if stamp_ns == _NO_STAMP else stamp_ns)


def read_caps(payload: bytes) -> Layout:
    """Read the description of the frames that follow; raises GdpError when they are not raw RGB."""
    text = payload.rstrip(b"\0").decode(errors="replace")
    width, height = (re.search(rf"\b{name}=\(int\)(\d+)", text) for name in ("width", "height"))
    if not text.startswith("video/x-raw") or "format=(string)RGB," not in f"{text}," or not (width and height):
        raise GdpError(f"the stream's frames are not raw RGB but {text[:100]}")
    rate = re.search(r"\bframerate=\(fraction\)(\d+)/(\d+)", text)
    fps = int(rate[1]) / int(rate[2]) if rate and int(rate[1]) and int(rate[2]) else None
    return Layout(int(width[1]), int(height[1]), fps)


def read_picture(payload: bytearray, layout: Layout) -> npt.NDArray[np.uint8]:
    """Return the picture [height, width, 3]; its rows fill up to 4 bytes. Raises GdpError for another size."""
    stride = (3 * layout.width + 3) // 4 * 4
    if len(payload) != stride * layout.height:
        raise GdpError(f"a frame has {len(payload)} bytes, not the {stride * layout.height} of its size")
    rows = np.frombuffer(payload, np.uint8).reshape(layout.height, stride)[:, : 3 * layout.width]
    return np.ascontiguousarray(rows).reshape(layout.height, layout.width, 3)
