"""How a recording is replayed: at its own rate, at another, or a frame whenever one is asked for."""

import threading
import time

import msgspec


class Pace(msgspec.Struct, frozen=True):
    """The wanted replay.

    `fps` replaces the recorded rate and `speed` multiplies it; with `step` no frame waits for its time, and with `once`
    the feed ends with the recording, instead of starting again.
    """

    once: bool = False
    fps: float | None = None
    speed: float = 1.0
    step: bool = False


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
