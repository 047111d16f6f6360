"""A camera, a capture card or a network stream through OpenCV, connected again with growing pauses when it fails."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources.feed import LiveFeed, LostError, Picture
from sonoedge.runtime.sources.stamps import StampMapper

CONNECT_MS = 5000
READ_MS = 6000  # longer than it takes to be called stalled
RTSP_READ_MS = READ_MS // 3  # FFmpeg gives an RTSP server up after three times what it is told
OLDEST_NS = 5_000_000_000  # a driver's stamp is of the monotonic clock when it lies at most this far back


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
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # what it warns of, `detail` says
    if spec.isdecimal() or spec.startswith("/dev/"):
        capture = cv2.VideoCapture(int(spec) if spec.isdecimal() else spec, cv2.CAP_V4L2)
        if fps is not None:
            capture.set(cv2.CAP_PROP_FPS, fps)
    else:
        read_ms = RTSP_READ_MS if spec.startswith("rtsp") else READ_MS
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, CONNECT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, read_ms]
        capture = cv2.VideoCapture(spec, cv2.CAP_FFMPEG, limits)
    if not capture.isOpened():
        capture.release()
        return None
    return capture  # type: ignore[return-value]


class LiveSource(LiveFeed):
    """A V4L2 device or a stream. Its frames carry the time that the driver, or the stream's sender, gives them."""

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
        super().__init__(spec, once=once, fps=fps)
        self._spec, self._wanted_fps = spec, fps
        self._open = connect
        self._capture: Capture | None = None
        try:
            self.connect()
        except LostError as error:
            raise SonoEdgeError(
                f"the live source {self.name} does not answer: check that it is plugged in and not in use"
            ) from error
        self.linked()

    def connect(self) -> None:
        """Open the device or the stream."""
        self._capture = self._open(self._spec, self._wanted_fps)
        if self._capture is None:
            raise LostError(f"{self.name} does not answer")
        stated = self._capture.get(cv2.CAP_PROP_FPS)
        if self._wanted_fps is None and 0 < stated <= 1000:
            self.fps = stated
        self._stamps = StampMapper()

    def receive(self, wait_s: float) -> Picture | None:  # noqa: ARG002 (OpenCV has its own timeouts)
        """Read one frame, for as long as OpenCV waits for it."""
        assert self._capture is not None
        ok, picture = self._capture.read()
        arrived_ns = time.monotonic_ns()
        if not ok:
            raise LostError(f"{self.name} broke off, or gave no frame for as long as OpenCV waits for one")
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            self.tell(f"frames of {picture.dtype} {list(picture.shape)} are left out: set the device to colour")
            return None
        captured_ns = self._captured_ns(round(self._capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6), arrived_ns)
        return Picture(np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8), captured_ns)

    def disconnect(self) -> None:
        """Release the device."""
        if self._capture is not None:
            self._capture.release()
            self._capture = None

    def _captured_ns(self, stamp_ns: int, arrived_ns: int) -> int:
        """Of V4L2 OpenCV gives the driver's stamp, mostly of CLOCK_MONOTONIC; of FFmpeg the time in the stream."""
        # Pictures over HTTP carry no time: FFmpeg counts them, which after a stall would make them seem old.
        if stamp_ns <= 0 or self.name.startswith("http"):  # this driver or stream says none
            return arrived_ns
        if 0 <= arrived_ns - stamp_ns <= OLDEST_NS and not self.name.startswith("rtsp"):
            return stamp_ns
        return self._stamps.captured_ns(stamp_ns, arrived_ns)
