"""The clock that every time on the page refers to, and the server's beside it."""

import time

DRIFT_S = 60.0  # clocks of two machines drift apart: what was learnt longer ago is forgotten


def now_ms() -> float:
    """Milliseconds on the viewer's monotonic clock."""
    return time.monotonic() * 1000


class ServerClock:
    """Tells times of the server's clock on the viewer's, by the message that waited least on its way."""

    def __init__(self) -> None:
        self._settled = self._current = float("inf")
        self._since_ms = now_ms()

    def heard(self, server_ms: float) -> None:
        """Learn from a message that was sent at `server_ms`."""
        now = now_ms()
        if now - self._since_ms > DRIFT_S * 1000:
            self._settled, self._current, self._since_ms = self._current, float("inf"), now
        self._current = min(self._current, now - server_ms)

    def here(self, server_ms: float) -> float:
        """Return the time on the viewer's clock."""
        return server_ms + min(self._settled, self._current)
