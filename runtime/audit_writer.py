"""Appends to the files of an audit log: the chain, the rotation, the bound, and going on after whatever happened."""

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from sonoedge import __version__
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.audit_chain import (
    HEAD_FILE,
    Begin,
    Dropped,
    Head,
    Record,
    decode_line,
    line_hash,
    read_end,
    read_head,
    read_records,
    segment_name,
    segments,
)

FILES = 8  # a full log has about so many, and drops an eighth at a time
SYNC_S = 1.0  # what a power cut may cost
CLOCK_MS = 1000.0  # how far the wall clock may leave the monotonic one before that is recorded


class ChainWriter:
    """Writes one chain, from one thread; every method but `close` raises OSError when the disk refuses."""

    def __init__(self, folder: Path, max_bytes: int, wall_ns: Callable[[], int], mono_ns: Callable[[], int]) -> None:
        """Lock the folder and find where its chain ends; raises SonoEdgeError when it is in use or cannot be made."""
        self._folder, self._max_bytes, self._segment_bytes = folder, max_bytes, max_bytes // FILES
        self._wall_ns, self._mono_ns = wall_ns, mono_ns
        self._file: IO[bytes] | None = None
        self._number = self._size = 0
        self.head = self._synced = Head()
        self.written = 0
        self._last_wall_ns = 0
        self._skew_ns: int | None = None  # wall minus monotonic clock at the last record
        self._sync_due = 0.0
        with contextlib.ExitStack() as undo:
            try:
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)  # no file: a full disk could not hold it
                undo.callback(os.close, self._lock)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._begin = self._find_end()
            except BlockingIOError as error:
                raise SonoEdgeError(f"{folder} is written by another process: stop it or name another one") from error
            except OSError as error:
                raise SonoEdgeError(f"{folder} cannot hold an audit log ({error.strerror}): name another") from error
            undo.pop_all()

    def begin(self) -> None:
        """Write the first record of this process: who it is, and what it found."""
        facts = {"process": os.getpid()}
        back_ms = (self._last_wall_ns - self._wall_ns()) / 1e6
        clock = {"clock_back_ms": back_ms} if back_ms > 0 else {}
        self._append(self._wall_ns(), self._mono_ns(), "begin", {**_begin_fields(self._begin), **facts, **clock})
        self._begin = Begin()

    def write(self, wall_ns: int, mono_ns: int, kind: str, fields: Mapping[str, Any]) -> None:
        """Append a record, and before it what the clock did."""
        skew_ns = wall_ns - mono_ns
        if self._skew_ns is not None and abs(skew_ns - self._skew_ns) > CLOCK_MS * 1e6:
            self._append(wall_ns, mono_ns, "clock", {"moved_ms": (skew_ns - self._skew_ns) / 1e6})
        self._skew_ns = skew_ns
        self._append(wall_ns, mono_ns, kind, fields)

    def sync(self, *, force: bool = False) -> None:
        """Push the file to the disk and then say how far it got, once a second and when forced."""
        now = time.monotonic()
        if self._file is None or self._synced == self.head or (now < self._sync_due and not force):
            return
        os.fsync(self._file.fileno())
        partial = self._folder / f".{HEAD_FILE}.partial"
        partial.write_bytes(msgspec.json.encode(self.head))
        partial.replace(self._folder / HEAD_FILE)
        self._synced, self._sync_due = self.head, now + SYNC_S

    def close(self) -> None:
        """Let go of the folder."""
        if self._file is not None:
            self._file.close()
        os.close(self._lock)

    def _find_end(self) -> Begin:
        """Find the last whole record, leave everything as it is, and say what was found damaged or missing."""
        damaged = []
        files = segments(self._folder)
        for path in reversed(files):
            line, after = read_end(path)
            if after is not None:
                damaged.append(after)
            if line is not None and (last := decode_line(line)) is not None:
                self.head, self._last_wall_ns = Head(last.seq, line_hash(line)), last.wall_ns
                break
        if files:
            # After damage goes a new file: nothing that is there is ever changed.
            self._number = int(files[-1].stem)
            self._size = self._segment_bytes if damaged else files[-1].stat().st_size
        known = read_head(self._folder)
        gone = known is not None and not self._holds(known)
        return Begin(damaged=tuple(reversed(damaged)), missing=known if gone else None)

    def _holds(self, head: Head) -> bool:
        """Whether the record that the head file names is in the files; it is among the newest ones."""
        if head == self.head or head.seq == 0:
            return True
        for path in reversed(segments(self._folder)):
            for line, record in reversed(read_records(path)):
                if record.seq <= head.seq:
                    return record.seq == head.seq and line_hash(line) == head.sha256
        return False

    def _append(self, wall_ns: int, mono_ns: int, kind: str, fields: Mapping[str, Any]) -> None:
        """Write one line whole or not at all."""
        line = self._line(wall_ns, mono_ns, kind, fields)
        if self._size and self._size + len(line) > self._segment_bytes:
            self._rotate()
            line = self._line(wall_ns, mono_ns, kind, fields)  # the chain has moved on
        if self._file is None:
            self._open(self._number or 1)
        assert self._file is not None
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._size)  # our own half line, which nobody has read
            raise
        self._size += len(line)
        self.head = Head(self.head.seq + 1, line_hash(line[:-1]))
        self._last_wall_ns = wall_ns
        self.written += 1

    def _line(self, wall_ns: int, mono_ns: int, kind: str, fields: Mapping[str, Any]) -> bytes:
        """The next line of the chain, with its newline; what cannot be written says so instead."""
        record = Record(self.head.seq + 1, wall_ns, mono_ns, kind, dict(fields), self.head.sha256)
        try:
            line = msgspec.json.encode(record)
            problem = f"{len(line)} bytes long" if len(line) > self._segment_bytes // 2 else None
        except (TypeError, ValueError, ArithmeticError) as error:
            problem = str(error)
        if problem is not None:
            line = msgspec.json.encode(msgspec.structs.replace(record, fields={"unrecordable": ascii(problem)[:500]}))
        return line + b"\n"

    def _open(self, number: int) -> None:
        """Open a file for appending, for its owner only."""
        path = self._folder / segment_name(number)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        self._number, self._size = number, os.fstat(descriptor).st_size

    def _rotate(self) -> None:
        """Begin a new file; one that would take the log over its bound makes the oldest go, which is recorded first."""
        if self._file is not None:
            self.sync(force=True)
            self._file.close()
            self._file = None
        files = segments(self._folder)
        dropped = []
        total = sum(path.stat().st_size for path in files)
        while len(files) > 1 and total + self._segment_bytes > self._max_bytes:
            total -= files[0].stat().st_size
            dropped.append(files.pop(0))
        self._open(self._number + 1)
        if dropped or self.written:  # else the process's own `begin` is about to be written
            told = []
            for path in dropped:
                line, _ = read_end(path)
                if line is not None and (last := decode_line(line)) is not None:
                    told.append(Dropped(path.name, last.seq, line_hash(line)))
            self._append(self._wall_ns(), self._mono_ns(), "begin", _begin_fields(Begin(dropped=tuple(told))))
            self.sync(force=True)
        for path in dropped:
            path.unlink(missing_ok=True)


def _begin_fields(begin: Begin) -> dict[str, Any]:
    said = {name: value for name, value in msgspec.structs.asdict(begin).items() if value}
    return {"version": __version__, **said}
