"""OpenIGTLink against pyigtl's own server in another process, and against servers that send what they should not."""

import contextlib
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources import open_source

Context = Callable[..., contextlib.AbstractContextManager[Any]]  # the fixtures `watched` and `child`

pytest.importorskip("pyigtl", reason="needs the extra igtl: pip install sonoedge[igtl]")

IGTL_SERVER = """
import sys, time
import numpy as np, pyigtl
server = pyigtl.OpenIGTLinkServer(port=int(sys.argv[1]))
matrix = np.diag([0.3, 0.3, 1.0, 1.0])
print("ready", flush=True)
number = 0
while True:
    time.sleep(0.02)
    if server.is_connected():
        size = (1, 48, 64) if number < 30 else (1, 24, 32)
        image = np.arange(size[1] * size[2], dtype=np.uint32).reshape(size).astype(np.uint8)
        server.send_message(pyigtl.TransformMessage(matrix, device_name="Tracker"), wait=False)
        server.send_message(pyigtl.ImageMessage(image, matrix, device_name="Probe"), wait=False)
        if number == 10:
            server.send_message(pyigtl.ImageMessage(image.astype(np.float32), device_name="Probe"), wait=False)
        server.send_message(pyigtl.ImageMessage(image[:, :4, :4].copy(), device_name="Other"), wait=False)
        number += 1
"""


def test_openigtlink_gives_pictures_spacing_and_recovers(watched: Context, child: Context, port: int) -> None:
    command = (sys.executable, "-c", IGTL_SERVER, str(port))
    with child(*command) as server, watched(f"igtl://127.0.0.1:{port}/Probe") as watch:
        source = watch.source
        watch.until_frames(11)
        watch.until(lambda: source.detail, 5)
        assert source.detail == "a picture was left out: its pixels are float32: send unsigned 8 bits"
        watch.until(lambda: watch.frames[-1].image.shape == (24, 32, 3), 10)
        assert watch.says() == ("live", "the frames changed from 64 x 48 to 32 x 24 pixels")
        first = watch.frames[0]
        expected = np.arange(48 * 64, dtype=np.uint32).reshape(48, 64).astype(np.uint8)
        np.testing.assert_array_equal(first.image, np.repeat(expected[:, :, None], 3, axis=2))
        assert first.spacing_mm == pytest.approx(0.3)
        server.kill()
        watch.until_state("lost", 5)
        assert source.detail is not None
        count = len(watch.frames)
        with child(*command):
            back = watch.until_frames(1)
            watch.until_state("live", 1)
            assert watch.frames[count].sequence == count
    print(f"back {back * 1000:.0f} ms after the new server was ready")
    assert back < 3  # the pauses between attempts grow while the new process starts


@contextlib.contextmanager
def sending(watched: Context) -> Iterator[tuple[Any, Callable[[bytes], None]]]:
    """A feed, and what sends bytes to it."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        watched(f"igtl://127.0.0.1:{server.getsockname()[1]}") as watch,
        server.accept()[0] as peer,
    ):
        yield watch, peer.sendall


def image(pixels: Any = None, **options: Any) -> Any:
    """A message with a picture, of one shade unless said otherwise."""
    from pyigtl.messages import ImageMessage

    return ImageMessage(np.full((1, 6, 8), 7, np.uint8) if pixels is None else pixels, **options)


def test_the_senders_times_are_kept_even_when_its_wall_clock_is_set_back(watched: Context) -> None:
    wall_s = 1_700_000_000.0
    stamps_s = [wall_s + 0.040 * number for number in range(10)]
    stamps_s += [wall_s - 3600 + 0.040 * number for number in range(10)]
    with sending(watched) as (watch, send):
        for number, stamp_s in enumerate(stamps_s):
            began = time.monotonic()
            send(image(timestamp=stamp_s).pack())
            watch.until_total(number + 1)
            time.sleep(max(0, 0.040 + 0.005 * (number % 3) + began - time.monotonic()))  # late, then later
    taken_ns = np.array([frame.captured_ns for frame in watch.frames])
    arrived_ns = np.array(watch.arrived_ns)
    assert (taken_ns <= arrived_ns).all()
    for half in (slice(0, 10), slice(10, 20)):
        gaps_ms = np.diff(taken_ns[half]) / 1e6
        assert np.median(gaps_ms) == pytest.approx(40, abs=2)
    assert taken_ns[10] > taken_ns[9]


def test_spacing_is_unknown_unless_the_pixels_are_square_and_told(watched: Context) -> None:
    matrices = [np.diag([*scale, 1.0, 1.0]) for scale in ((0.2, 0.2), (1, 1), (0.2, 0.3), (np.nan, 0.2), (1e9, 1e9))]
    turned = np.diag([0.5, 0.5, 0.5, 1.0]) @ np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with sending(watched) as (watch, send):
        for matrix in (*matrices, turned):
            send(image(ijk_to_world_matrix=matrix).pack())
        watch.until_total(6)
    told = [None if frame.spacing_mm is None else round(frame.spacing_mm, 6) for frame in watch.frames]
    assert told == [0.2, None, None, None, None, 0.5]


def header(kind: str, body: bytes, *, size: int | None = None, version: int = 1) -> bytes:
    """A message whose header may say anything."""
    fields = struct.pack(">H12s20sIIQQ", version, kind.encode(), b"Probe", 1, 0, len(body) if size is None else size, 0)
    return fields + body


WHOLE = image().pack()[58:]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (image(np.zeros((1, 6, 8), np.uint16)).pack(), "uint16"),
        (image(np.zeros((3, 6, 8), np.uint8)).pack(), "3 slices"),
        (image(np.zeros((1, 6, 8, 2), np.uint8)).pack(), "2 channels"),
        (image(np.zeros((1, 0, 8), np.uint8)).pack(), "left out"),
        (header("IMAGE", b""), "left out"),
        (header("IMAGE", WHOLE[:40]), "left out"),
        (header("IMAGE", WHOLE[:-1]), "left out"),
        (header("IMAGE", WHOLE[:6] + b"\xff\xff" * 3 + WHOLE[12:]), "left out"),
        (header("IMAGE", WHOLE[:3] + b"\xee" + WHOLE[4:]), "left out"),
        (header("IMAGE", b"\0\x0c\0\x0a\0\0\0\x09\0\0\0\0" + WHOLE, version=2), "left out"),
    ],
)
def test_a_picture_that_is_not_what_it_says_is_left_out(watched: Context, message: bytes, told: str) -> None:
    with sending(watched) as (watch, send):
        send(message)
        watch.until(lambda: watch.source.detail is not None, 5)
        assert told in watch.source.detail
        send(image().pack())
        watch.until_total(1)
        assert watch.says()[0] == "live"


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (b"HTTP/1.1 200 OK\r\n" + b"x" * 100, "what is not OpenIGTLink"),
        (b"\0\1" + b"\xff" * 100, "what is not OpenIGTLink"),
        (header("IMAGE", b"", size=2**40), "announces 1099511627776 bytes"),
    ],
)
def test_what_cannot_be_followed_is_a_loss(watched: Context, message: bytes, told: str) -> None:
    with sending(watched) as (watch, send):
        send(message)
        watch.until(lambda: told in (watch.source.detail or ""), 5)


def test_damaged_messages_never_end_the_feed(watched: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sonoedge.runtime.sources.feed.FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr("sonoedge.runtime.sources.feed.LONGEST_PAUSE_S", 0.002)
    random = np.random.default_rng(0)
    whole = image().pack()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        watched(f"igtl://127.0.0.1:{server.getsockname()[1]}") as watch,
    ):
        server.settimeout(10)
        for _ in range(200):
            message = bytearray(whole)
            for place in random.integers(0, 58 + 72, random.integers(1, 4)):
                message[place] = random.integers(256)
            with server.accept()[0] as peer:
                peer.sendall(message)
        with server.accept()[0] as peer:
            count = len(watch.frames)
            peer.sendall(whole)
            watch.until_total(count + 1)


def test_a_tracker_that_never_pauses_does_not_hold_the_end_up(watched: Context) -> None:
    from pyigtl.messages import TransformMessage

    many = TransformMessage(np.eye(4), device_name="Tracker").pack() * 500
    ended = threading.Event()
    with sending(watched) as (watch, send):

        def flood() -> None:
            with contextlib.suppress(OSError):
                while not ended.is_set():
                    send(many)

        thread = threading.Thread(target=flood)
        thread.start()
        watch.until_state("stalled", 10)  # messages come, but no frames
        began = time.monotonic()
        watch.end()
        assert time.monotonic() - began < 2
        ended.set()
        thread.join(5)


def test_refusals(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    with pytest.raises(SonoEdgeError, match=r"does not answer.*check that the OpenIGTLink server runs"):
        open_source(f"igtl://127.0.0.1:{port}")
    for wrong in ("igtl://", "igtl://host:99999", "igtl://host:0", "igtl://[::1"):
        with pytest.raises(SonoEdgeError, match="names no server"):
            open_source(wrong)
    monkeypatch.setitem(sys.modules, "pyigtl.messages", None)
    with pytest.raises(SonoEdgeError, match=r"sonoedge\[igtl\]"):
        open_source("igtl://127.0.0.1")
