"""Fixtures of the fault tests: a camera that can be unplugged, supervised servers, and a stopwatch for recoveries."""

import contextlib
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.client import Client
from sonoedge.runtime.protocol import Status

HERE = Path(__file__).parent
FPS = 30.0


class Camera:
    """A network camera (motion JPEG over HTTP) on loopback, whose cable and shutter a test holds."""

    def __init__(self) -> None:
        self.plugged, self.running = threading.Event(), threading.Event()
        self.plugged.set()
        self.running.set()
        camera = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if not camera.plugged.is_set():
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                with contextlib.suppress(OSError):
                    camera.play(self.wfile.write)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/live"

    def play(self, write: Callable[[bytes], object]) -> None:
        number = 0
        while self.plugged.is_set():
            if self.running.wait(1 / FPS):
                number += 1
                picture = np.full((96, 128, 3), number % 200, np.uint8)
                jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
                write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg))
                time.sleep(1 / FPS)

    def close(self) -> None:
        self.plugged.clear()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def camera() -> Iterator[Camera]:
    """A network camera that plays until `camera.running` or `camera.plugged` is cleared."""
    made = Camera()
    yield made
    made.close()


@pytest.fixture
def stopwatch() -> Callable[..., float]:
    """Wait until something holds and return after how many seconds: `stopwatch(lambda: ..., within_s=3)`."""

    def wait(holds: Callable[[], object], *, within_s: float) -> float:
        began = time.monotonic()
        while not holds():
            assert time.monotonic() < began + within_s, f"not so within {within_s} s"
            time.sleep(0.02)
        return time.monotonic() - began

    return wait


@pytest.fixture
def status() -> Callable[[str], Status | None]:
    """Ask an endpoint for its status with a socket of its own; None when nothing answers within a second."""

    def ask(endpoint: str) -> Status | None:
        with Client(endpoint, timeout_s=1.0) as client:
            try:
                return client.status()
            except SonoEdgeError:
                return None

    return ask


class Supervised:
    """A supervisor in a process of its own, and what it says, line by line."""

    def __init__(self, command: list[str], watchdog_s: float) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, str(HERE / "supervisor.py"), str(watchdog_s), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.events.append(msgspec.json.decode(line))

    def count(self, event: str) -> int:
        return sum(e.get("event") == event for e in self.events)

    def pid(self) -> int:
        return int([e for e in self.events if e.get("event") == "started"][-1]["pid"])

    def model(self) -> str:
        """The model of the latest ready line."""
        return str([e for e in self.events if e.get("ready")][-1]["model"])

    def end(self) -> tuple[int, str]:
        """Drain, and return the status and what was written to standard error."""
        self.popen.terminate()
        assert self.popen.stderr is not None
        err = self.popen.stderr.read()
        status = self.popen.wait(30)
        self._reader.join()
        return status, err


@pytest.fixture
def supervise() -> Iterator[Callable[..., Supervised]]:
    """Run a command under the supervisor: `supervise([sys.executable, ...], watchdog_s=1.0)`."""
    running: list[Supervised] = []

    def start(command: list[str], *, watchdog_s: float = 20.0) -> Supervised:
        running.append(Supervised(command, watchdog_s))
        return running[-1]

    yield start
    for supervised in running:
        if supervised.popen.poll() is None:
            supervised.end()
        for stream in (supervised.popen.stdout, supervised.popen.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def faulty(tokenizer_file: Path) -> Callable[..., list[str]]:
    """The command of a fake server that breaks on signals: `faulty(source, "--bind", endpoint)`."""

    def command(source: object, *options: str) -> list[str]:
        return [sys.executable, str(HERE / "serve_faulty.py"), str(tokenizer_file), str(source), *options]

    return command
