"""Frames that another program pushes, over real sockets."""

import contextlib
import itertools
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources import open_source
from sonoedge.runtime.sources.pusher import MAX_BYTES, FramePusher, PushedHeader

Context = Callable[..., contextlib.AbstractContextManager[Any]]  # the fixtures `watched` and `child`

ROOT = Path(__file__).parents[3]
ONE = np.ones((8, 8), np.uint8)

PUSHER = """
import sys, time
import numpy as np
from sonoedge.runtime.sources.gstreamer import GStreamerSource
from sonoedge.runtime.sources.pusher import FramePusher
pusher = FramePusher(sys.argv[1])
print("ready", flush=True)
while True:
    pusher.push(np.full((48, 64), 7, np.uint8), spacing_mm=0.25)
    time.sleep(0.02)
"""


def test_pushed_frames_arrive_with_their_time_and_spacing(tmp_path: Path, watched: Context) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    picture = np.arange(48 * 64 * 3, dtype=np.uint32).reshape(48, 64, 3).astype(np.uint8)
    with watched(endpoint) as watch, FramePusher(endpoint) as pusher:
        watch.until(lambda: watch.source.detail is None, 5)  # before, that nobody has connected yet
        taken_ns = time.monotonic_ns() - 12_000_000
        assert pusher.push(picture, spacing_mm=0.2, captured_ns=taken_ns)
        watch.until_total(1)
        assert pusher.push(picture[:, :, 0])
        watch.until_total(2)
        assert watch.says()[1] is None
        assert pusher.push(picture[::2, ::2])
        watch.until_total(3)
        assert watch.source.detail == "the frames changed from 64 x 48 to 32 x 24 pixels"
    colour, grey, small = watch.frames
    np.testing.assert_array_equal(colour.image, picture)
    assert (colour.captured_ns, colour.spacing_mm, colour.sequence) == (taken_ns, 0.2, 0)
    np.testing.assert_array_equal(grey.image, np.repeat(picture[:, :, :1], 3, axis=2))
    assert 0 <= watch.arrived_ns[1] - grey.captured_ns < 1e9
    assert (grey.spacing_mm, small.sequence) == (None, 2)
    assert all(frame.image.flags.c_contiguous for frame in watch.frames)


def test_the_devices_own_clock_keeps_its_gaps_even_when_it_begins_anew(tmp_path: Path, watched: Context) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    with watched(endpoint) as watch, FramePusher(endpoint) as pusher:
        watch.until(lambda: watch.source.detail is None, 5)
        stamps_ns = [10**6, 10**6 + 5, 7, 9]  # the device was switched off and on after the second
        for number, stamp_ns in enumerate(stamps_ns):
            assert pusher.push(np.zeros((8, 8), np.uint8), device_ns=stamp_ns)
            watch.until_total(number + 1)
        assert pusher.push(np.zeros((8, 8), np.uint8), captured_ns=time.monotonic_ns() + 10**12)  # a wall clock's
        watch.until_total(5)
        assert watch.source.detail == "the frames' captured_ns is not of CLOCK_MONOTONIC: push it as device_ns"
    taken_ns = [frame.captured_ns for frame in watch.frames]
    assert [taken_ns[1] - taken_ns[0], taken_ns[3] - taken_ns[2]] == [5, 2]
    assert taken_ns[2] > taken_ns[1] + 5
    assert all(taken <= arrived for taken, arrived in zip(taken_ns, watch.arrived_ns, strict=True))
    assert 0 <= watch.arrived_ns[4] - taken_ns[4] < 1e9


def test_a_second_pusher_is_left_out_and_told_until_the_first_is_gone(tmp_path: Path, watched: Context) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    first_picture, second_picture = np.full((8, 8), 1, np.uint8), np.full((8, 8), 2, np.uint8)
    with watched(endpoint) as watch, FramePusher(endpoint) as second:
        with FramePusher(endpoint) as first:
            watch.until(lambda: first.push(first_picture), 5)
            watch.until_total(1)
            watch.until(lambda: second.push(second_picture), 5)
            watch.until(lambda: watch.source.detail is not None, 5)
            assert watch.source.detail == (
                "a message was left out: a second program pushes frames as well: stop one of them"
            )
            assert first.push(first_picture)
            watch.until_total(2)
        shades = [frame.image[0, 0, 0] for frame in watch.frames]
        assert shades == [1, 1]
        watch.until(lambda: second.push(second_picture) and len(watch.frames) > 2, 5)
    assert {frame.image[0, 0, 0] for frame in watch.frames[2:]} == {2}


def test_what_a_dead_pusher_leaves_behind_does_not_shut_out_its_successor(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    source = open_source(endpoint)
    frames = iter(source)  # nobody reads yet
    with FramePusher(endpoint) as dead:
        sent, until = 0, time.monotonic() + 2
        while time.monotonic() < until and sent < 20:
            sent += dead.push(ONE)
            time.sleep(0.01)
    assert sent >= 2
    with FramePusher(endpoint) as successor:
        stop = threading.Event()

        def push() -> None:
            while not stop.wait(0.01):
                successor.push(2 * ONE)

        thread = threading.Thread(target=push)
        thread.start()
        impatience = threading.Timer(30, source.close)
        impatience.start()
        shades = [frame.image[0, 0, 0] for frame in itertools.takewhile(lambda f: f.image[0, 0, 0] == 1, frames)]
        assert source.state == "live"  # and not ended
        impatience.cancel()
        stop.set()
        thread.join()
    assert len(shades) <= sent
    source.close()
    list(frames)


@pytest.mark.parametrize("greeting", [b"", b"GET / HTTP/1.1\r\n\r\n" * 9, b"\xff" + bytes(8) + b"\x7f\x03"])
def test_a_connection_that_is_no_pusher_changes_nothing(tmp_path: Path, watched: Context, greeting: bytes) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    with watched(endpoint) as watch, FramePusher(endpoint) as pusher:
        watch.until(lambda: pusher.push(ONE), 5)
        watch.until_state("live")
        with socket.socket(socket.AF_UNIX) as stray:
            stray.connect(f"{tmp_path}/frames")
            if greeting:
                stray.sendall(greeting)
                stray.settimeout(5)
                stray.recv(64)  # the server's greeting; then it hangs up, or waits for more
        with FramePusher(endpoint):  # once it is counted, so is what came before it
            watch.until(lambda: watch.source._connections == 2, 5)
        assert watch.says()[0] == "live"


def test_a_message_that_is_too_large_cuts_its_sender_off(tmp_path: Path, watched: Context) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with watched(endpoint) as watch, contextlib.closing(context.socket(zmq.PUSH)) as giant:
        giant.set(zmq.LINGER, 0)
        giant.connect(endpoint)
        giant.send(bytes(MAX_BYTES + 1))
        watch.until_state("lost", 10)
        giant.close()
        with FramePusher(endpoint) as pusher:
            watch.until(lambda: pusher.push(ONE), 5)
            watch.until_total(1)
    context.destroy(0)


def test_a_killed_pusher_is_lost_and_its_successor_is_taken_up(
    tmp_path: Path, watched: Context, child: Context
) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    with watched(endpoint) as watch:
        assert watch.says()[0] == "waiting"
        assert watch.source.detail == f"no program has connected to {endpoint} yet"
        with child(sys.executable, "-c", PUSHER, endpoint):
            watch.until_frames(5)
            assert watch.says()[0] == "live"
        took = watch.until_state("lost", 5)
        assert watch.source.detail == "the program that pushed the frames is gone"
        with child(sys.executable, "-c", PUSHER, endpoint):
            back = watch.until_frames(1)
            watch.until_state("live", 1)
    print(f"lost after {took * 1000:.0f} ms, back {back * 1000:.0f} ms after the new one was ready")
    assert took < 1
    assert back < 1


def test_a_connected_pusher_that_pushes_nothing_stalls(tmp_path: Path, watched: Context) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    with watched(endpoint) as watch, FramePusher(endpoint) as pusher:
        assert 1.5 < watch.until_state("stalled", 5) < 3.5
        assert watch.source.detail is not None
        assert watch.source.detail.startswith("connected but no frames for 2.")
        pusher.push(np.zeros((8, 8), np.uint8))
        assert watch.until_state("live", 2) < 0.5


def header(**changes: object) -> bytes:
    """The header of a grey picture of 2 x 2, changed."""
    return msgspec.msgpack.encode({"sender": 1, "width": 2, "height": 2, "channels": 1} | changes)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([b"\x80"], "1 parts"),
        ([b"nonsense", b"1234"], "left out: "),
        ([msgspec.msgpack.encode(PushedHeader(1, 2, 2, 1)), b"12345"], "5 bytes of pixels"),
        ([msgspec.msgpack.encode(PushedHeader(1, 2, 2, 2)), b"12345678"], "2 x 2 x 2"),
        (
            [msgspec.msgpack.encode({"sender": 1, "width": 2, "height": 2, "channels": 1, "v": 9}), b"1234"],
            r"<= 1 - at `\$\.v`",
        ),
        ([header(width=9**9), b"1234"], r"\$\.width"),
        ([header(extra=1), b"1234"], "extra"),
    ],
)
def test_a_malformed_message_is_left_out_and_told(
    tmp_path: Path, parts: list[bytes], told: str, watched: Context
) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with watched(endpoint) as watch, contextlib.closing(context.socket(zmq.PUSH)) as push:
        push.set(zmq.LINGER, 0)
        push.connect(endpoint)
        push.send_multipart(parts)
        watch.until(lambda: watch.source.detail and "left out" in watch.source.detail, 5)
        assert watch.source.detail is not None
        assert re.search(told, watch.source.detail), watch.source.detail
        push.send_multipart([msgspec.msgpack.encode(PushedHeader(1, 2, 2, 1)), b"1234"])
        watch.until_total(1)
    context.destroy(0)


def test_a_pusher_never_blocks(tmp_path: Path) -> None:
    with FramePusher(f"ipc://{tmp_path}/nobody") as pusher:
        began = time.monotonic()
        assert not any(pusher.push(np.zeros((480, 640, 3), np.uint8)) for _ in range(20))
        assert time.monotonic() - began < 1
        for wrong in (
            np.broadcast_to(np.uint8(0), (8192, 8192, 3)),
            np.zeros((4, 4), np.float32),
            np.zeros((4, 4, 2), np.uint8),
            np.zeros((0, 4), np.uint8),
        ):
            with pytest.raises(ValueError, match="push uint8"):
                pusher.push(wrong)  # type: ignore[arg-type]


def test_once_ends_with_the_pusher(tmp_path: Path, watched: Context) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    with watched(endpoint, once=True) as watch:
        with FramePusher(endpoint) as pusher:
            watch.until(lambda: pusher.push(np.zeros((8, 8), np.uint8)), 5)
            watch.until_total(1)
        watch.until_state("ended", 5)


def test_frames_are_taken_from_this_machine_only_and_from_one_place(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="unknown scheme"):
        open_source("tcp://127.0.0.1:5599")
    first = open_source(f"ipc://{tmp_path}/frames")
    with pytest.raises(SonoEdgeError, match="in use"):
        open_source(f"ipc://{tmp_path}/frames")
    first.close()
    open_source(f"ipc://{tmp_path}/frames").close()


def test_the_example_pushes_what_its_callback_gets(tmp_path: Path, watched: Context) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    with watched(endpoint) as watch:
        command = [sys.executable, str(ROOT / "examples" / "push_frames.py"), endpoint, "--frames", "15"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        told = int(ended.stdout.split(" of 15 frames")[0])
        assert told >= 10  # the first come before the connection stands
        watch.until(lambda: len(watch.frames) == told, 5)
    assert watch.frames[0].image.shape == (480, 640, 3)
    assert watch.frames[0].spacing_mm == pytest.approx(0.15)
