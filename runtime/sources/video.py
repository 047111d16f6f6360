"""A video file, decoded by OpenCV's FFmpeg."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources.pace import Pace
from sonoedge.runtime.sources.recorded import RecordedSource


class VideoSource(RecordedSource):
    """The frames of a video file at the rate that it states."""

    def __init__(self, path: Path, pace: Pace) -> None:
        """Decode the first frame; raises SonoEdgeError when there is none, or no rate is stated and none given."""
        self._path = path
        capture = self._open()
        try:
            stated = capture.get(cv2.CAP_PROP_FPS)
            has_frame = capture.read()[0]
        finally:
            capture.release()
        if not has_frame:
            raise SonoEdgeError(f"the video {path} has no frames: record it again or give another file")
        if pace.fps is None and not 0 < stated <= 1000:
            raise SonoEdgeError(f"the video {path} states the frame rate {stated:g}: say the true one with --fps")
        super().__init__(str(path), pace, fps=stated)

    def pictures(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the frames from the file's start."""
        capture = self._open()  # seeking back to frame 0 is not exact for every codec
        try:
            while True:
                ok, picture = capture.read()
                if not ok:
                    return
                yield np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
        finally:
            capture.release()

    def _open(self) -> cv2.VideoCapture:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # what it warns of is told as one sentence
        capture = cv2.VideoCapture(str(self._path), cv2.CAP_FFMPEG)
        if not capture.isOpened():
            raise SonoEdgeError(
                f"{self._path} is no video that FFmpeg can read, nor a picture or a DICOM clip: give another file"
            )
        return capture
