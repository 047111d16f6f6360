"""The protocol of the pipe from GStreamer, and the times that senders give."""

import binascii
import struct

import numpy as np
import pytest

from sonoedge.runtime.sources.gdp import GdpError, Layout, Packet, read_caps, read_header, read_picture
from sonoedge.runtime.sources.stamps import StampMapper


def header(kind: int = 1, length: int = 12, stamp_ns: int = 5, major: int = 1, flags: int = 1) -> bytes:
    """A header as `gdppay` writes it."""
    start = struct.pack(">BBBxHIQ", major, 0, flags, kind, length, stamp_ns) + b"\0" * 40
    return start + struct.pack(">HH", binascii.crc_hqx(start, 0xFFFF) ^ 0xFFFF, 0)


# The start of what gdppay 1.22 wrote for 322 x 8 RGB: the header of its caps.
RECORDED = bytes.fromhex("010001000002000000bc") + b"\0" * 48 + bytes.fromhex("0ed00000")


def test_a_recorded_header_is_read() -> None:
    assert read_header(RECORDED) == Packet(type=2, length=188, stamp_ns=0)


def test_headers() -> None:
    assert read_header(header()) == Packet(1, 12, 5)
    assert read_header(header(stamp_ns=2**64 - 1)).stamp_ns is None
    damaged = bytearray(header())
    damaged[8] ^= 1
    for wrong, told in (
        (bytes(damaged), "damaged"),
        (header(major=0), "version 0"),
        (header(length=2**31), "more than"),
    ):
        with pytest.raises(GdpError, match=told):
            read_header(wrong)
    assert read_header(bytes(bytearray(header(flags=0))[:58] + b"\1\2\0\0")).length == 12  # nothing to check it by


def test_caps() -> None:
    caps = "video/x-raw, format=(string)RGB, width=(int)322, height=(int)8, framerate=(fraction)30000/1001"
    layout = read_caps(caps.encode() + b"\0")
    assert (layout.width, layout.height) == (322, 8)
    assert layout.fps == pytest.approx(29.97, abs=0.01)
    assert read_caps(caps.replace("30000/1001", "0/1").encode()).fps is None
    for wrong in (caps.replace("RGB", "RGBA"), caps.replace("x-raw", "x-h264"), "video/x-raw, format=(string)RGB"):
        with pytest.raises(GdpError, match="not raw RGB"):
            read_caps(wrong.encode())


def test_rows_are_taken_out_of_their_filling() -> None:
    rows = np.arange(2 * 8, dtype=np.uint8).reshape(2, 8)  # 2 pixels are 6 bytes, filled up to 8
    picture = read_picture(bytearray(rows.tobytes()), Layout(2, 2, None))
    assert picture.tolist() == [[[0, 1, 2], [3, 4, 5]], [[8, 9, 10], [11, 12, 13]]]
    assert picture.flags.c_contiguous
    with pytest.raises(GdpError, match="15 bytes, not the 16"):
        read_picture(bytearray(15), Layout(2, 2, None))


def test_jitter_is_taken_out_of_the_senders_times() -> None:
    mapper, random = StampMapper(), np.random.default_rng(0)
    true_ns = np.arange(300, dtype=np.int64) * 33_000_000 + 10**12
    sent_ns = true_ns - 987_654_321_000  # the sender's clock began at another time
    arrived_ns = true_ns + 2_000_000 + random.exponential(5e6, 300).astype(np.int64)
    told = np.array(
        [mapper.captured_ns(int(sent), int(arrived)) for sent, arrived in zip(sent_ns, arrived_ns, strict=True)]
    )
    assert (told <= arrived_ns).all()
    errors_ms = (told - true_ns)[30:] / 1e6
    late_ms = (arrived_ns - true_ns).max() / 1e6
    print(f"error {errors_ms.min():.2f} to {errors_ms.max():.2f} ms; of the arrival up to {late_ms:.0f} ms")
    assert errors_ms.min() >= 2  # the part that every frame has stays
    assert errors_ms.max() < 3


def test_a_slower_clock_is_followed_and_one_set_back_starts_anew() -> None:
    mapper = StampMapper()
    for number in range(2000):  # 1 ms a second too slow, for 60 s
        arrived_ns = number * 30_000_000
        told = mapper.captured_ns(round(arrived_ns * 0.999), arrived_ns)
        assert 0 <= arrived_ns - told <= 10_100_000  # what it lost in the window of 10 s
    assert mapper.captured_ns(5, 70_000_000_000) == 70_000_000_000
    assert mapper.captured_ns(5 + 10**6, 70_000_000_000 + 3 * 10**6) == 70_000_000_000 + 10**6
