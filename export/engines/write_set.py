"""Writes a bundle's engines for a profile beside their place and renames them when all are there."""

import contextlib
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

import msgspec

from sonoedge.engine_manifest import ENGINES_FILE, EngineSet, engines_folder
from sonoedge.errors import DISK_FULL, SonoEdgeError
from sonoedge.export.engines.timing import TIMING_CACHE


class SetWriter:
    """Enter, write plans into `folder`, `commit`; a set that was there before stays until then, and else for good.

    Raises SonoEdgeError when the bundle cannot be written, another run is at it, and the disk is full.
    """

    def __init__(self, bundle: Path, profile: str) -> None:
        """`profile` is the id of the device that the engines are for."""
        self._place = engines_folder(bundle, profile)
        self.folder = self._place.with_name(f".{profile}.partial")
        self._previous = self._place.with_name(f".{profile}.previous")
        self._lock: int | None = None

    def __enter__(self) -> "SetWriter":
        """Make the temporary folder, with the timing cache of the last build in it."""
        engines = self._place.parent
        try:
            engines.mkdir(exist_ok=True)
            self._lock = os.open(engines, os.O_RDONLY)
            self._take_turns()
            self._tidy()
            self.folder.mkdir()
            if (kept := self._place / TIMING_CACHE).exists():
                shutil.copyfile(kept, self.folder / TIMING_CACHE)
        except OSError as error:
            self._leave()
            raise SonoEdgeError(
                f"{engines} cannot be written ({error.strerror}): copy the bundle to a disk that can be, or "
                "correct its permissions"
            ) from error
        except SonoEdgeError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove what is not complete; a full disk is told as such."""
        self._leave()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise SonoEdgeError(f"{self._place}: the disk is full: free space and run it again") from error

    def commit(self, engines: EngineSet) -> None:
        """Write the manifest of the set, push all of it to the disk and give it its name."""
        text = msgspec.json.format(msgspec.json.encode(engines), indent=2) + b"\n"
        (self.folder / ENGINES_FILE).write_bytes(text)
        for path in (*self.folder.iterdir(), self.folder):
            _sync(path)
        # A folder cannot be replaced in one step: between the two there is no set, which a session refuses plainly.
        if self._place.exists():
            self._place.rename(self._previous)
        self.folder.rename(self._place)
        _sync(self._place.parent)
        shutil.rmtree(self._previous, ignore_errors=True)

    def _take_turns(self) -> None:
        """Lock the folder for as long as this process lives; the system frees it when the process is killed."""
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SonoEdgeError(
                f"another run is building engines in {self._place.parent}: wait until it has ended"
            ) from error

    def _tidy(self) -> None:
        """Clear up behind a run that was killed: what it had not completed goes, what it was replacing comes back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._previous.exists() and not self._place.exists():
            self._previous.rename(self._place)
        shutil.rmtree(self._previous, ignore_errors=True)

    def _leave(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._release()
        with contextlib.suppress(OSError):  # it holds engines, or was never made
            self._place.parent.rmdir()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
