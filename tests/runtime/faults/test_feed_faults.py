"""What the probe does: it is unplugged, it stalls, its pictures change size; served in a process over real sockets."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.protocol import Hint, State, Status

ServeProcess = Callable[..., Any]
Stopwatch = Callable[..., float]
AskStatus = Callable[[str], Status | None]

UNPLUGGED_S = 1.0


class Heard:
    """Everything published on an endpoint since it was made."""

    def __init__(self, endpoint: str) -> None:
        self.hints: list[Hint] = []
        self.states: list[State] = []
        self._stop = False
        self._thread = threading.Thread(target=self._listen, args=(endpoint,))
        self._thread.start()

    def _listen(self, endpoint: str) -> None:
        for message in listen(endpoint, timeout_s=None):
            if isinstance(message, Hint):
                self.hints.append(message)
            elif isinstance(message, State):
                self.states.append(message)
            if self._stop:
                return

    def state(self) -> str | None:
        return self.states[-1].state if self.states else None

    def close(self) -> None:
        self._stop = True
        self._thread.join(10)


@pytest.fixture
def hear() -> Iterator[Callable[[str], Heard]]:
    made: list[Heard] = []

    def start(endpoint: str) -> Heard:
        made.append(Heard(endpoint))
        return made[-1]

    yield start
    for heard in made:
        heard.close()


def test_an_unplugged_camera_is_lost_and_comes_back(
    serve_process: ServeProcess, camera: Any, hear: Callable[[str], Heard], stopwatch: Stopwatch
) -> None:
    process = serve_process(camera.url)
    heard = hear(process.ready["hints_bind"])
    stopwatch(lambda: len(heard.hints) > 10, within_s=10)
    camera.plugged.clear()
    noticed_s = stopwatch(lambda: heard.state() == "lost", within_s=5)
    last = heard.hints[-1].frame
    with Client(process.ready["bind"], timeout_s=10) as client:  # what was seen may still be asked about
        assert client.answer("Is a lesion visible?").frame >= last
    time.sleep(UNPLUGGED_S)
    last = heard.hints[-1].frame
    camera.plugged.set()
    recovered_s = stopwatch(lambda: heard.hints[-1].frame > last, within_s=5)
    stopwatch(lambda: heard.state() == "live", within_s=1)
    print(f"lost after {noticed_s:.2f} s, hints again after {recovered_s:.2f} s")
    assert recovered_s < 2 * UNPLUGGED_S + 1  # pauses double, so that the next is at most as long as all before it
    assert process.popen.poll() is None


def test_a_camera_that_stalls_is_told_from_a_live_one(
    serve_process: ServeProcess, camera: Any, hear: Callable[[str], Heard], stopwatch: Stopwatch
) -> None:
    process = serve_process(camera.url)
    heard = hear(process.ready["hints_bind"])
    stopwatch(lambda: len(heard.hints) > 10, within_s=10)
    camera.running.clear()
    noticed_s = stopwatch(lambda: heard.state() == "stalled", within_s=4)
    assert heard.states[-1].detail is not None
    assert "connected but no frames" in heard.states[-1].detail
    said = len(heard.hints)
    time.sleep(0.3)
    assert len(heard.hints) == said  # nothing is said of a picture that does not come
    camera.running.set()
    hinted_s = stopwatch(lambda: len(heard.hints) > said, within_s=3)
    recovered_s = hinted_s + stopwatch(lambda: heard.state() == "live", within_s=1)
    print(f"stalled after {noticed_s:.2f} s, hints again after {hinted_s:.2f} s, live after {recovered_s:.2f} s")
    assert hinted_s < 1.5


def test_pictures_that_change_size_are_all_looked_at(
    serve_process: ServeProcess, tmp_path: Path, status: AskStatus, stopwatch: Stopwatch
) -> None:
    sizes = [(96, 128), (240, 320), (60, 500), (480, 40), (8, 8), (700, 900)]
    for number, size in enumerate(sizes):
        noise = np.random.default_rng(number).integers(30, 200, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), noise)
    process = serve_process(tmp_path, "--fps", "10")

    def turned() -> bool:
        now = status(process.ready["bind"])
        return now is not None and now.telemetry.frames >= 3 * len(sizes)

    stopwatch(turned, within_s=20)
    now = status(process.ready["bind"])
    assert now is not None
    assert now.telemetry.failed == 0
    assert now.source.state == "live"
    with Client(process.ready["bind"], timeout_s=10) as client:
        assert client.answer("Is a lesion visible?").answer in ("yes", "no")
