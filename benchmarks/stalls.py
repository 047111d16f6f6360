"""How often this machine keeps a program that only sleeps waiting: what no server on it could have avoided."""

from __future__ import annotations

import subprocess
import sys

import msgspec

# In a process of its own: sleeps 2 ms at a time until a line comes on standard input, and tells how late it was.
SLEEPER = """
import json, select, sys, time
late_ms = []
while not select.select([sys.stdin], [], [], 0)[0]:
    began = time.monotonic()
    time.sleep(0.002)
    late_ms.append((time.monotonic() - began) * 1e3 - 2)
print(json.dumps([x for x in late_ms if x > float(sys.argv[1])]))
"""


class Stalls(msgspec.Struct, frozen=True):
    """Times that the sleeper was late by more than a frame."""

    count: int
    worst_ms: float
    total_ms: float


class StallWatch:
    """Watches from its making until `stop`."""

    def __init__(self, longer_than_ms: float) -> None:
        self._sleeper = subprocess.Popen(
            [sys.executable, "-c", SLEEPER, str(longer_than_ms)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def stop(self) -> Stalls:
        """End it and return what it saw."""
        late_ms = msgspec.json.decode(self._sleeper.communicate("stop\n", timeout=30)[0], type=list[float])
        return Stalls(len(late_ms), round(max(late_ms, default=0.0), 1), round(sum(late_ms), 1))
