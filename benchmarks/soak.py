"""Serves a clip at 30 frames a second for minutes with one subscriber, then with many, of which one never reads.

python -m benchmarks.soak [--bundle BUNDLE] [--minutes 10] [--subscribers 1 20] [--source CLIP] [--fps 30]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import zmq

from benchmarks.served import CLIP, resident_bytes, served
from benchmarks.stalls import Stalls, StallWatch
from sonoedge.runtime.endpoints import connect
from sonoedge.runtime.protocol import Hint, Telemetry, decode_broadcast

SETTLED_S = 60.0  # from then on memory is compared
SAMPLE_S = 1.0

# A subscriber in a process of its own that connects and then never reads, with buffers as small as the kernel allows.
STALLED = """
import sys, time, zmq
sock = zmq.Context().socket(zmq.SUB)
sock.set(zmq.RCVHWM, 1)
sock.set(zmq.RCVBUF, 4096)
sock.subscribe(b"")
sock.connect(sys.argv[1])
time.sleep(1e6)
"""


class Soaked(msgspec.Struct, frozen=True):
    """One run; latencies are those of every frame's last hint, from its capture to its way onto the wire."""

    subscribers: int
    stalled: int
    minutes: float
    frames: int
    dropped: int
    failed: int
    hinted: int
    heard_frames: list[int]  # by each subscriber that reads; it may have come after the first frames
    p50_ms: float
    p95_ms: float
    p99_ms: float
    worst_ms: float
    resident_settled_bytes: int  # after a minute, or half-way through a shorter run
    resident_end_bytes: int
    resident_growth: float  # of the one relative to the other
    machine_stalls: Stalls  # longer than a frame, of a process beside the server that only slept
    exit_status: int


class _Subscriber:
    """Reads everything on a thread of its own."""

    def __init__(self, endpoint: str) -> None:
        self.age_ms: dict[int, float] = {}  # frame → age when its last hint went onto the wire
        self.telemetry: Telemetry | None = None
        self._stop = threading.Event()
        self._socket = connect(zmq.SUB, endpoint)
        self._socket.subscribe(b"")
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._stop.is_set():
            if self._socket.poll(100):
                message = decode_broadcast(self._socket.recv())
                if isinstance(message, Hint):
                    self.age_ms[message.frame] = message.age_ms
                elif isinstance(message, Telemetry):
                    self.telemetry = message
        self._socket.close()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def soak(bundle: Path, source: str, *, fps: float, minutes: float, subscribers: int) -> Soaked:
    """Serve for so long with so many subscribers, the last of several stalled; raises RuntimeError if nothing came."""
    settled_s = min(SETTLED_S, minutes * 30)
    with served(bundle, source, fps=fps) as server:
        stalled = 1 if subscribers > 1 else 0
        # One reads all; the others, in a process of their own, count, so that reading takes little from the server.
        first = _Subscriber(server.hints_bind)
        watch = StallWatch(1000 / fps)
        crowd = subprocess.Popen(
            [sys.executable, "-c", COUNTING, server.hints_bind, str(subscribers - 1 - stalled)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        sleeper = subprocess.Popen([sys.executable, "-c", STALLED, server.hints_bind]) if stalled else None
        try:
            began, settled = time.monotonic(), 0
            while (passed_s := time.monotonic() - began) < minutes * 60:
                if not settled and passed_s >= settled_s:
                    settled = resident_bytes(server.pid)
                time.sleep(min(SAMPLE_S, max(0.0, minutes * 60 - passed_s)))
            ended = resident_bytes(server.pid)
            counts = crowd.communicate("stop\n", timeout=30)[0]
        finally:
            for process in (crowd, sleeper):
                if process is not None and process.poll() is None:
                    process.kill()
                    process.wait()
        first.stop()
        stalls = watch.stop()
        server.stop()
    summary = msgspec.json.decode(server.summary, type=Telemetry)
    if not first.age_ms:
        raise RuntimeError(f"no hint came from {bundle} in {minutes} minutes")
    p50, p95, p99 = (float(value) for value in np.percentile(list(first.age_ms.values()), (50, 95, 99)))
    return Soaked(
        subscribers=subscribers,
        stalled=stalled,
        minutes=minutes,
        frames=summary.frames,
        dropped=summary.dropped,
        failed=summary.failed,
        hinted=summary.hinted,
        heard_frames=[len(first.age_ms), *msgspec.json.decode(counts, type=list[int])],
        p50_ms=round(p50, 2),
        p95_ms=round(p95, 2),
        p99_ms=round(p99, 2),
        worst_ms=round(max(first.age_ms.values()), 2),
        resident_settled_bytes=settled,
        resident_end_bytes=ended,
        resident_growth=round(ended / settled - 1, 4),
        machine_stalls=stalls,
        exit_status=server.exit_status(),
    )


# Subscribers in one process that count the frames they hear of; a line on standard input ends it.
COUNTING = """
import json, select, sys, msgspec, zmq
class Message(msgspec.Struct):
    type: str
    frame: int = -1
context, decoder, poller = zmq.Context(), msgspec.msgpack.Decoder(Message), zmq.Poller()
sockets = [context.socket(zmq.SUB) for _ in range(int(sys.argv[2]))]
heard = {sock: set() for sock in sockets}
for sock in sockets:
    sock.subscribe(b"")
    sock.connect(sys.argv[1])
    poller.register(sock, zmq.POLLIN)
poller.register(sys.stdin, zmq.POLLIN)
while True:
    for sock, _ in poller.poll():
        if sock not in heard:
            print(json.dumps([len(frames) for frames in heard.values()]))
            sys.exit()
        message = decoder.decode(sock.recv())
        if message.type == "hint":
            heard[sock].add(message.frame)
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("demo_out/bundle"))
    parser.add_argument("--minutes", type=float, default=10.0, help="of each run")
    parser.add_argument("--subscribers", type=int, nargs="+", default=[1, 20], help="one run each")
    parser.add_argument("--source", default=str(CLIP))
    parser.add_argument("--fps", type=float, default=30.0)
    options = parser.parse_args()
    runs = []
    for subscribers in options.subscribers:
        run = soak(options.bundle, options.source, fps=options.fps, minutes=options.minutes, subscribers=subscribers)
        print(
            f"{run.subscribers} subscribers: {run.dropped} of {run.frames} dropped, p99 {run.p99_ms} ms; "
            f"the machine stalled {run.machine_stalls.count} times, {run.machine_stalls.worst_ms} ms at worst",
            file=sys.stderr,
        )
        runs.append(run)
    print(msgspec.json.encode(runs).decode())
