"""The folder in which a build works, beside the bundle to be: kept when a build is halted, so that it can go on."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from sonoedge.errors import DISK_FULL, SonoEdgeError

KEPT = "what is finished is kept, run the same command again to go on"


class BuildWork:
    """Context around a build of `out`: `folder` is its working place, of earlier use when `resumed` is true.

    identity: hash of all that the build depends on; a folder of another identity is cleared. After success and after a
    refusal nothing is left; after a halt (a kill, Ctrl-C, a full disk) the folder stays. Raises SonoEdgeError when
    another build of the same bundle runs, or when the place cannot be written.
    """

    def __init__(self, out: Path, identity: str) -> None:
        self.out, self._identity = out, identity
        self.folder = out.parent / f".{out.name}.building"
        self.resumed = False
        self._made: list[Path] = []  # folders above `out` that did not exist, outermost first
        self._lock: IO[bytes] | None = None

    @property
    def bundle(self) -> Path:
        """Where the bundle's files are put together."""
        return self.folder / "bundle"

    @property
    def weights(self) -> Path:
        """The weights file while it is written."""
        return self.folder / "model.weights"

    def __enter__(self) -> BuildWork:
        self._made = [parent for parent in reversed(self.out.parents) if not parent.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._close()
            raise SonoEdgeError(f"{self.out} is being built by another process: wait for it") from error
        except OSError as error:
            self._remove()
            raise SonoEdgeError(f"{self.out} cannot be written ({error.strerror}): choose another --out") from error
        noted = self.folder / "identity"
        self.resumed = noted.exists() and noted.read_text() == self._identity
        for path in self.folder.iterdir():
            if path.name != "lock" and (not self.resumed or path == self.bundle):
                _delete(path)
        noted.write_text(self._identity)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        cause = error.__cause__ if isinstance(error, SonoEdgeError) else error
        full = isinstance(cause, OSError) and cause.errno in DISK_FULL
        if full:
            self._close()
            raise SonoEdgeError(f"{self.out}: the disk is full: free space; {KEPT}") from error
        if error is None or isinstance(error, SonoEdgeError):
            self._remove()
        self._close()

    def link_weights(self, place: Path) -> None:
        """Put the finished weights file at `place` as well, without a copy."""
        place.unlink(missing_ok=True)
        place.hardlink_to(self.weights)

    def _close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):  # the bundle is in it, or another program put something there
                parent.rmdir()


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
