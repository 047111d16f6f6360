"""What every recorded feed shares: a true pace, looping, and frames stamped when they are shown."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.sources import SourceState


class Pacer:
    """Ticks on a fixed grid of the monotonic clock: no drift, and late ticks are left out, never bunched."""

    def __init__(self, fps: float, stop: threading.Event) -> None:
        self._period_ns = 1e9 / fps
        self._stop = stop
        self._start_ns: int | None = None
        self._tick = 0

    def wait(self) -> bool:
        """Sleep until the next tick; False when stopped."""
        now = time.monotonic_ns()
        if self._start_ns is None:
            self._start_ns = now
        else:
            self._tick = max(self._tick + 1, int((now - self._start_ns) / self._period_ns))
        due_ns = self._start_ns + round(self._tick * self._period_ns)
        return not self._stop.wait(max(0, due_ns - now) / 1e9)


class RecordedSource(ABC):
    """A feed read from files, played at `fps` and again from its start unless `once`."""

    def __init__(self, name: str, *, once: bool, fps: float) -> None:
        self.name = name
        self.fps = fps
        self.state: SourceState = "waiting"
        self.spacing_mm: float | None = None
        self.sector: tuple[int, int, int, int] | None = None
        self._once = once
        self._stop = threading.Event()

    @abstractmethod
    def pictures(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the feed's RGB pictures [height, width, 3] from its start to its end."""

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames at `fps`; raises SonoEdgeError when the files break while playing."""
        pacer, sequence = Pacer(self.fps, self._stop), 0
        while not self._stop.is_set():
            start = sequence
            for picture in self.pictures():
                if not pacer.wait():
                    break
                self.state = "live"
                yield Frame(picture, sequence, time.monotonic_ns(), self.spacing_mm, self.name, self.sector)
                sequence += 1
            if sequence == start and not self._stop.is_set():
                self.state = "lost"
                raise SonoEdgeError(
                    f"the source {self.name} has no frames any more: check that the file is still there"
                )
            if self._once:
                break
        self.state = "ended"

    def close(self) -> None:
        """End the iteration."""
        self._stop.set()
