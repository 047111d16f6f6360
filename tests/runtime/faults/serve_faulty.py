"""Serves a fake model as serve_fake.py does, and breaks on demand.

SIGUSR1 sets the clock back a day, SIGUSR2 hangs the session.
"""

import runpy
import signal
import time
from pathlib import Path
from typing import Any

from sonoedge.runtime.sessions.fake import FakeSession

BACK_S = 86_400


def set_back(_number: int, _frame: object) -> None:
    """Let the wall clock be a day behind from now on; the monotonic clock knows nothing of it."""
    clock, clock_ns = time.time, time.time_ns
    time.time = lambda: clock() - BACK_S
    time.time_ns = lambda: clock_ns() - BACK_S * 1_000_000_000


def hang(_number: int, _frame: object) -> None:
    """Let the session never come back, as a driver that lost its device does."""

    def forever(*_: Any, **__: Any) -> None:
        time.sleep(3600)

    FakeSession.encode_image = forever  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, set_back)
    signal.signal(signal.SIGUSR2, hang)
    runpy.run_path(str(Path(__file__).parent.with_name("serve_fake.py")), run_name="__main__")
