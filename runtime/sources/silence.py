"""When a feed that gives no frames counts as stalled, and how that is said."""

import time

STALL_S = 2.0  # connected, but no frame for this long
STALL_FRAMES = 5  # and for this many frames of a slow feed


def is_stalled(since_ns: int, fps: float) -> bool:
    """Whether frames have been missing for too long, since a time of the monotonic clock."""
    return _missing_s(since_ns) > max(STALL_S, STALL_FRAMES / fps)


def describe(since_ns: int) -> str:
    """Say for how long frames have been missing."""
    return f"connected but no frames for {_missing_s(since_ns):.1f} s"


def _missing_s(since_ns: int) -> float:
    return (time.monotonic_ns() - since_ns) / 1e9
