"""When a frame was taken, on this machine's monotonic clock, from the time that its sender says."""

from collections import deque

WINDOW_NS = 10_000_000_000  # the least delay is taken over this long: longer keeps a drifting clock's error


class StampMapper:
    """Maps a sender's own clock to `time.monotonic_ns()` by the least delay seen in the last 10 seconds.

    Jitter of the way is taken out; the part of the delay that every frame has cannot be known and stays in.
    """

    def __init__(self) -> None:
        self._least: deque[tuple[int, int]] = deque()  # (arrival, arrival - stamp), delays rising from left to right
        self._last_ns: int | None = None

    def captured_ns(self, stamp_ns: int, arrived_ns: int) -> int:
        """Return when the frame stamped `stamp_ns` was taken, at the latest when it arrived.

        A stamp before the last one means that the sender's clock began anew: what was learnt is forgotten.
        """
        if self._last_ns is not None and stamp_ns < self._last_ns:
            self._least.clear()
        self._last_ns = stamp_ns
        offset_ns = arrived_ns - stamp_ns
        while self._least and self._least[-1][1] >= offset_ns:
            self._least.pop()
        self._least.append((arrived_ns, offset_ns))
        while self._least[0][0] < arrived_ns - WINDOW_NS:
            self._least.popleft()
        return stamp_ns + self._least[0][1]
