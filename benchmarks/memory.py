"""The memory of a command that no file backs, all its processes together: what a smaller machine would have to have."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

SAMPLE_S = 0.2
FAILED_LINES = 20  # of a failed command's output, quoted in the error


class Measured(msgspec.Struct, frozen=True):
    """What one command took."""

    seconds: float
    peak_anonymous_bytes: int
    last_line: str  # of its standard output


class CommandFailedError(Exception):
    """A measured command ended with another status than 0; carries the end of what it wrote."""


def run_measured(command: Sequence[str]) -> Measured:
    """Run `command` to its end, watching its memory; its standard error passes through.

    Raises CommandFailedError when it ends with another status than 0.
    """
    began = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        stopped = threading.Event()
        peaks: list[int] = []
        sampler = threading.Thread(target=_sample, args=(process.pid, stopped, peaks), name="memory", daemon=True)
        sampler.start()
        assert process.stdout is not None  # asked for above
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", file=sys.stderr)
        status = process.wait()
        stopped.set()
        sampler.join()
    if status != 0:
        told = "\n".join(lines[-FAILED_LINES:])
        raise CommandFailedError(f"{' '.join(command)} ended with status {status}: {told}")
    return Measured(round(time.monotonic() - began, 1), max(peaks, default=0), lines[-1] if lines else "")


def anonymous_bytes(root: int, above: int = 0) -> int:
    """Anonymous memory now of the process `root` and all below it; pages that forks share are counted once.

    Gives 0 when it is not more than `above`, which is known without a walk through all the pages.
    """
    try:
        tree = [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    # The kernel keeps the first count ready, in which a shared page counts whole in every process; for the second,
    # where it counts as 1/n in each of n, it walks the pages, which would slow down what is measured.
    if sum(_field_bytes(pid, "status", "RssAnon:") for pid in tree) <= above:
        return 0
    return sum(_field_bytes(pid, "smaps_rollup", "Pss_Anon:") for pid in tree)


def _field_bytes(pid: int, file: str, field: str) -> int:
    """A field of /proc/PID/FILE; 0 for a process that has ended, or has ended and waits for its parent."""
    try:
        text = Path(f"/proc/{pid}/{file}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field)), 0)


def _sample(root: int, stopped: threading.Event, peaks: list[int]) -> None:
    """Append to `peaks` whenever the memory is larger than ever before."""
    peak = 0
    while True:
        now = anonymous_bytes(root, above=peak)
        if now > peak:
            peak = now
            peaks.append(now)
        if stopped.wait(SAMPLE_S):
            return
