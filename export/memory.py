"""How much memory a piece of work takes: this process and all its children together, sampled while it runs."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil

SAMPLE_S = 0.2


class PeakMemory:
    """Context whose `bytes` is the largest resident memory seen so far, children included."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.is_set():
            total = 0
            for member in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the listing and the look
                    total += member.memory_info().rss
            self.bytes = max(self.bytes, total)
            self._stop.wait(SAMPLE_S)
