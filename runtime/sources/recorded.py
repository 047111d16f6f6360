"""What every recorded feed shares: a true pace, looping, and frames stamped when they are shown."""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.sources import SourceState, silence
from sonoedge.runtime.sources.pace import Pace, Pacer


class RecordedSource(ABC):
    """A feed read from files, played at `fps` and again from its start unless `once`.

    `detail` names a frame that could not be decoded.
    """

    def __init__(self, name: str, pace: Pace, *, fps: float) -> None:
        """fps: of the recording."""
        self.name = name
        self.fps = (pace.fps or fps) * pace.speed
        self.spacing_mm: float | None = None
        self.sector: tuple[int, int, int, int] | None = None
        self.still = False  # pictures that are no moving clip
        self._pace = pace
        self._phase: SourceState = "waiting"
        self._note: str | None = None
        self._asked_ns: int | None = None  # when the frame that is being read was asked for
        self._stop = threading.Event()

    @property
    def state(self) -> SourceState:
        """What the feed is doing now: a file on a medium that hangs is stalled."""
        return "stalled" if self._is_stalled() else self._phase

    @property
    def detail(self) -> str | None:
        """More about it in words; None when there is nothing to add."""
        asked_ns = self._asked_ns
        return silence.describe(asked_ns) if asked_ns is not None and self._is_stalled() else self._note

    @abstractmethod
    def pictures(self) -> Iterator[npt.NDArray[np.uint8] | None]:
        """Yield the RGB pictures [height, width, 3] from start to end; None keeps the time of one that is damaged."""

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames at `fps`; raises SonoEdgeError when the files break while playing."""
        pacer, sequence = Pacer(self.fps, self._stop), 0
        while not self._stop.is_set():
            start, self._asked_ns = sequence, time.monotonic_ns()
            for picture in self.pictures():
                if not self._pace.step and not pacer.wait():
                    break
                if picture is None:
                    continue
                if self._stop.is_set():
                    break
                self._phase, self._asked_ns = "live", None
                now_ns = time.monotonic_ns()
                yield Frame(picture, sequence, now_ns, self.spacing_mm, self.name, self.sector, still=self.still)
                sequence, self._asked_ns = sequence + 1, time.monotonic_ns()
            if sequence == start and not self._stop.is_set():
                self._phase, self._asked_ns = "lost", None
                raise SonoEdgeError(
                    f"the source {self.name} has no frames any more: check that the file is still there"
                )
            if self._pace.once:
                break
        self._phase, self._asked_ns = "ended", None

    def close(self) -> None:
        """End the iteration."""
        self._stop.set()

    def _is_stalled(self) -> bool:
        asked_ns = self._asked_ns
        return asked_ns is not None and silence.is_stalled(asked_ns, self.fps)
