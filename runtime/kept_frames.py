"""Frames kept beside the audit log, only where the configuration asks for it: what the model saw, as JPEG files.

They are the cropped sector, never the whole picture, so names burned in beside it are not kept.
"""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError

QUALITY = 90


class KeptFrames:
    """Keeps frames as `RUN-SEQUENCE.jpg` in a folder of at most `max_bytes`; the oldest make room."""

    def __init__(self, folder: Path, max_bytes: int, run: int) -> None:
        """`run` tells this process's sequence numbers from an earlier one's: its first record in the audit log."""
        self._folder, self._max_bytes, self._run = folder, max_bytes, run
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._sizes = {path: path.stat().st_size for path in sorted(folder.glob("*.jpg"))}
            self._total = sum(self._sizes.values())
        except OSError as error:
            raise SonoEdgeError(f"{folder} cannot keep frames ({error.strerror}): name another folder") from error

    def keep(self, sequence: int, sector: npt.NDArray[np.uint8]) -> Path:
        """Write the sector, RGB of any size, and return its file; raises OSError when the disk refuses."""
        path = self._folder / f"{self._run:012d}-{sequence:012d}.jpg"
        _, jpeg = cv2.imencode(".jpg", cv2.cvtColor(sector, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        data = jpeg.tobytes()
        while self._sizes and self._total + len(data) > self._max_bytes:
            oldest = next(iter(self._sizes))
            oldest.unlink(missing_ok=True)
            self._total -= self._sizes.pop(oldest)
        try:
            path.write_bytes(data)
        except OSError:
            path.unlink(missing_ok=True)  # half a picture is none
            raise
        self._sizes[path] = len(data)
        self._total += len(data)
        return path
