"""A camera, a capture card or a network stream through OpenCV, connected again with growing pauses when it fails."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.sources import SourceState

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
TIMEOUT_MS = 5000  # to connect, and between frames
NOMINAL_FPS = 30.0  # for devices that state no rate; a live feed sets its own pace


class Capture(Protocol):
    """The part of cv2.VideoCapture that a live feed needs."""

    def read(self) -> tuple[bool, npt.NDArray[np.uint8]]:
        """Return whether there was a frame, and the frame as BGR."""
        ...

    def get(self, prop: int) -> float:
        """Return a property of the device."""
        ...

    def release(self) -> None:
        """Disconnect."""
        ...


def connect(spec: str, fps: float | None) -> Capture | None:
    """Connect a camera number, a device path or a stream; None when nothing answers."""
    if spec.isdecimal() or spec.startswith("/dev/"):
        capture = cv2.VideoCapture(int(spec) if spec.isdecimal() else spec, cv2.CAP_V4L2)
        if fps is not None:
            capture.set(cv2.CAP_PROP_FPS, fps)
    else:
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, TIMEOUT_MS]
        capture = cv2.VideoCapture(spec, cv2.CAP_FFMPEG, limits)
    if not capture.isOpened():
        capture.release()
        return None
    return capture  # type: ignore[return-value]


class LiveSource:
    """A feed that sets its own pace; `state` says whether it is waiting for a frame, live, lost or ended."""

    def __init__(
        self,
        spec: str,
        *,
        once: bool = False,
        fps: float | None = None,
        connect: Callable[[str, float | None], Capture | None] = connect,
    ) -> None:
        """Connect; raises SonoEdgeError when the device is not there or the stream does not answer."""
        if spec.startswith("/dev/") and not Path(spec).exists():
            raise SonoEdgeError(f"there is no device {spec}: see the ones there are with `ls /dev/video*`")
        self.name = spec
        self.state: SourceState = "waiting"
        self._once = once
        self._wanted_fps = fps
        self._connect = connect
        self._stop = threading.Event()
        self._capture = connect(spec, fps)
        if self._capture is None:
            raise SonoEdgeError(f"the live source {spec} does not answer: check that it is plugged in and not in use")
        stated = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps or (stated if 0 < stated <= 1000 else NOMINAL_FPS)

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames as they come, connecting again after a failure (unless `once`) until closed."""
        sequence, pause_s = 0, FIRST_PAUSE_S
        while not self._stop.is_set():
            if self._capture is None:
                if self._stop.wait(pause_s):
                    break
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self._capture = self._connect(self.name, self._wanted_fps)
                self.state = "lost" if self._capture is None else "waiting"
                continue
            ok, picture = self._capture.read()
            if ok:
                self.state, pause_s = "live", FIRST_PAUSE_S
                rgb = np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
                yield Frame(rgb, sequence, time.monotonic_ns(), None, self.name)
                sequence += 1
                continue
            self._release()
            self.state = "lost"
            if self._once:
                break
        self._release()
        self.state = "ended"

    def close(self) -> None:
        """End the iteration after the read that is under way."""
        self._stop.set()

    def _release(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None
