"""The audit log: what was said about which frame by which model, in an append-only chain that shows tampering.

`record` only queues; a thread of the log's own writes, so no disk ever holds up a hint. The system gets each record as
soon as the thread does (a killed process loses at most what is queued), and the disk gets it at least once a second (a
power cut loses at most the last second).
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec

from sonoedge.errors import DISK_FULL, SonoEdgeError
from sonoedge.runtime.audit_chain import Head
from sonoedge.runtime.audit_writer import ChainWriter

MAX_BYTES = 256 * 2**20
SMALLEST_BYTES = 64 * 1024
QUEUE = 10_000  # records that wait for the disk before newer ones are lost, and counted
RETRY_S = 1.0  # after the disk refused
POLL_S = 0.1


class AuditState(msgspec.Struct, frozen=True):
    """How the log is doing; `lost` are records that found the queue full while the disk refused."""

    state: Literal["writing", "disk full", "failing"]
    detail: str | None
    written: int
    waiting: int
    lost: int


class AuditLog:
    """Appends to the log in a folder from any thread; `close` writes what waits."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int = MAX_BYTES,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        mono_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """Go on after what is there; raises SonoEdgeError when another process writes there or the folder is no use.

        max_bytes: of all its files; the oldest is dropped, and that recorded, when a new one would go over it.
        """
        if max_bytes < SMALLEST_BYTES:
            raise SonoEdgeError(f"an audit log of {max_bytes} bytes is too small: allow at least {SMALLEST_BYTES}")
        self._folder = folder
        self._wall_ns, self._mono_ns = wall_ns, mono_ns
        self._writer = ChainWriter(folder, max_bytes, wall_ns, mono_ns)
        self._queue: queue.Queue[tuple[int, int, str, Mapping[str, Any]]] = queue.Queue(QUEUE)
        self._counting = threading.Lock()
        self._lost = self._lost_told = 0
        self._problem: OSError | None = None
        self._defect: Exception | None = None
        self._closing = threading.Event()
        self._begun = False
        self._pending: tuple[int, int, str, Mapping[str, Any]] | None = None
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def record(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Queue a record, whose fields must not change any more; never waits and never raises."""
        try:
            self._queue.put_nowait((self._wall_ns(), self._mono_ns(), kind, fields))
        except queue.Full:
            with self._counting:
                self._lost += 1

    @property
    def state(self) -> AuditState:
        """Return how the log is doing."""
        counts = self._writer.written, self._queue.qsize(), self._lost
        if self._defect is not None:
            return AuditState("failing", f"a defect, report it: {self._defect!r}", *counts)
        if (problem := self._problem) is None:
            return AuditState("writing", None, *counts)
        full = problem.errno in DISK_FULL
        way_out = "free space" if full else "check the disk and its permissions"
        return AuditState("disk full" if full else "failing", f"{self._folder}: {problem.strerror}: {way_out}", *counts)

    @property
    def head(self) -> Head:
        """Where the chain stands; worth noting somewhere that a tamperer cannot reach."""
        return self._writer.head

    def close(self) -> None:
        """Write what waits, unless the disk refuses, and let go."""
        self._closing.set()
        self._thread.join()
        self._writer.close()

    def __enter__(self) -> "AuditLog":
        """Use as a context."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def _run(self) -> None:
        try:
            self._write_all()
        except Exception as error:  # noqa: BLE001 (told by `state`: the log must not end the hints)
            self._defect = error

    def _write_all(self) -> None:
        """Write what comes until `close`, trying again and again where the disk refuses."""
        while True:
            over = self._write_waiting()
            if over or (self._problem is not None and self._closing.wait(RETRY_S)):
                return

    def _write_waiting(self) -> bool:
        """Write what waits; True when that was all there will be."""
        try:
            if not self._begun:
                self._writer.begin()
                self._begun = True
            with contextlib.suppress(queue.Empty):
                self._pending = self._pending or self._queue.get(timeout=POLL_S)
            while self._pending is not None:
                self._writer.write(*self._pending)
                self._pending = None
                self._writer.sync()
                with contextlib.suppress(queue.Empty):
                    self._pending = self._queue.get_nowait()
            self._tell_lost()
            over = self._closing.is_set() and self._queue.empty()
            self._writer.sync(force=over)
        except OSError as error:
            self._problem = error
            return False
        self._problem = None
        return over

    def _tell_lost(self) -> None:
        lost = self._lost
        if lost > self._lost_told:
            self._writer.write(self._wall_ns(), self._mono_ns(), "lost", {"records": lost - self._lost_told})
            self._lost_told = lost
