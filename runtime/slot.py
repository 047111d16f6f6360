"""Where the capture thread leaves the newest frame and the worker takes it: the latest wins, the rest are counted."""

import threading

from sonoedge.runtime.frame import Frame


class LatestFrameSlot:
    """Holds one frame that nobody has taken yet, and remembers the newest one ever put."""

    def __init__(self) -> None:
        self.received = 0
        self.dropped = 0  # replaced before anyone took them
        self.newest: Frame | None = None
        self._waiting: Frame | None = None
        self._wanted = False  # someone looked for a frame and found none
        self._woken = False
        self._condition = threading.Condition()

    def put(self, frame: Frame) -> None:
        """Leave a frame, in place of one that was not taken."""
        with self._condition:
            self.received += 1
            self.dropped += self._waiting is not None
            self._waiting = self.newest = frame
            self._wanted = False
            self._condition.notify_all()

    def get(self, timeout_s: float) -> Frame | None:
        """Take the frame; None after `timeout_s` without one, or at once after `wake`."""
        with self._condition:
            if self._waiting is None:
                self._wanted = True
                self._condition.notify_all()
            self._condition.wait_for(lambda: self._waiting is not None or self._woken, timeout_s)
            frame, self._waiting, self._woken = self._waiting, None, False
            return frame

    def wait_wanted(self, timeout_s: float) -> bool:
        """Wait until someone has looked for a frame since the last one was put; False after `timeout_s`."""
        with self._condition:
            return self._condition.wait_for(lambda: self._wanted, timeout_s)

    def wake(self) -> None:
        """Make the present or next `get` return at once."""
        with self._condition:
            self._woken = True
            self._condition.notify_all()

    @property
    def full(self) -> bool:
        """Whether a frame waits to be taken."""
        with self._condition:
            return self._waiting is not None
