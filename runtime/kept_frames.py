"""Frames kept beside the audit log, only where the configuration asks for it: what the model saw, as JPEG files.

They are the cropped sector, never the whole picture, so names burned in beside it are not kept.
"""

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sight import Sight

QUALITY = 90
MAX_BYTES = 2**30
WAITING = 16  # frames that wait for the disk


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

    def path(self, sequence: int) -> Path:
        """Return where the frame of that number is kept."""
        return self._folder / f"{self._run:012d}-{sequence:012d}.jpg"

    def keep(self, sequence: int, sector: npt.NDArray[np.uint8]) -> Path:
        """Write the sector, RGB of any size, and return its file; raises OSError when the disk refuses."""
        path = self.path(sequence)
        if path in self._sizes:
            return path
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


class FrameKeeper:
    """Writes frames on a thread of its own, so that no disk ever holds up a hint."""

    def __init__(self, folder: KeptFrames, record: Callable[[str, Mapping[str, Any]], None]) -> None:
        """record: the audit log's, which is told of a frame that was not kept after all."""
        self._folder, self._record = folder, record
        self._sights: queue.Queue[Sight | None] = queue.Queue(WAITING)
        self._last: int | None = None
        self._thread = threading.Thread(target=self._run, name="kept-frames", daemon=True)
        self._thread.start()

    def keep(self, sight: Sight) -> Mapping[str, str]:
        """Keep a frame and return where, as a record says it; from one thread, which never waits."""
        sequence = sight.frame.sequence
        if sequence != self._last:
            try:
                self._sights.put_nowait(sight)
            except queue.Full:
                return {"not_kept": f"{WAITING} frames wait for the disk"}
            self._last = sequence
        return {"kept": self._folder.path(sequence).name}

    def close(self) -> None:
        """Write what waits and end."""
        self._sights.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (sight := self._sights.get()) is not None:
            self._write(sight)

    def _write(self, sight: Sight) -> None:
        try:
            self._folder.keep(sight.frame.sequence, sight.frame.image)
        except OSError as error:
            name = self._folder.path(sight.frame.sequence).name
            self._record("not_kept", {"file": name, "problem": error.strerror or str(error)})


def keep_no_frame(_sight: Sight) -> Mapping[str, str]:
    """Stand in for `FrameKeeper.keep` where nobody asked for frames."""
    return {}
