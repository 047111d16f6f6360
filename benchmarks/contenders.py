"""Contenders as processes: started once, then asked in turn, so that a disturbance meets all of them alike."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType

import msgspec

from benchmarks.environments import ROOT, Peer, UnavailableError, interpreter
from benchmarks.worker import Facts, Task, Timing


class ContenderFailedError(Exception):
    """A contender's process ended before it answered; what it said is on standard error."""


class Running(AbstractContextManager["Running"]):
    """A loaded contender that waits for tasks, and computes nothing between them."""

    def __init__(self, peer: Peer, options: msgspec.Struct, threads: int) -> None:
        """Start and load it; raises UnavailableError when it cannot be installed, ContenderFailedError on failure."""
        self.title = peer.title
        work = [str(interpreter(peer)), "-m", peer.module, "--threads", str(threads)]
        work += ["--worker", msgspec.json.encode(options).decode()]
        pools = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            work, cwd=ROOT, env=os.environ | pools, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.facts = msgspec.json.decode(self._reply(), type=Facts)

    def seconds(self, task: Task) -> float:
        """Have the task done and return what it took."""
        assert self._process.stdin is not None  # a pipe was asked for
        self._process.stdin.write(msgspec.json.encode(task) + b"\n")
        self._process.stdin.flush()
        return msgspec.json.decode(self._reply(), type=Timing).seconds

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        if kind is not None:
            self._process.kill()
        self._process.wait()

    def _reply(self) -> bytes:
        assert self._process.stdout is not None  # a pipe was asked for
        line = self._process.stdout.readline()
        if not line:
            raise ContenderFailedError(f"{self.title} ended with status {self._process.wait()} before it answered")
        return line


def start(
    contenders: Mapping[str, tuple[Peer, msgspec.Struct]], threads: int, stack: ExitStack
) -> tuple[dict[str, Running], dict[str, str]]:
    """Load every contender until `stack` ends; gives those that run, and why others are left out."""
    running: dict[str, Running] = {}
    skipped: dict[str, str] = {}
    for name, (peer, options) in contenders.items():
        print(f"loading {name}", file=sys.stderr, flush=True)
        try:
            running[name] = stack.enter_context(Running(peer, options, threads))
        except UnavailableError as error:
            skipped[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
    return running, skipped


def interleave(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every measure once a round, each round starting with the next one, after a round that is thrown away."""
    names = list(measures)
    results: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            value = measures[name]()
            if index > 0:
                results[name].append(value)
    return results


class Summary(msgspec.Struct, frozen=True):
    """Rounds of one measure."""

    median: float
    least: float
    largest: float


class Measured(msgspec.Struct, frozen=True):
    """One contender in a comparison; `ratio` is how many times quicker SonoEdge was."""

    version: str
    tokens_s: Summary
    ratio: float


def summarize(values: list[float], digits: int = 2) -> Summary:
    """Median and range of the rounds."""
    return Summary(*(round(value, digits) for value in (statistics.median(values), min(values), max(values))))


def ratio(ours: list[float], theirs: list[float]) -> float:
    """How many times quicker we are: the median over rounds of `theirs` / `ours`, both in seconds."""
    return round(statistics.median(their / our for our, their in zip(ours, theirs, strict=True)), 2)
