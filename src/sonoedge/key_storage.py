"""Key files on disk: made whole or not at all, never over one that is there, and secret ones for their owner only."""

import os
import stat
from pathlib import Path

from sonoedge.errors import SonoEdgeError

LARGEST_BYTES = 64 * 1024
FOR_OWNER, FOR_ALL = 0o600, 0o644


def write_new(files: dict[Path, tuple[bytes, int]]) -> None:
    """Write each file's content with its mode; raises SonoEdgeError before the first when one of them exists."""
    for path in files:
        if path.exists() or path.is_symlink():
            raise SonoEdgeError(f"{path} exists: a key in use is never overwritten, give another name")
    for path, (data, mode) in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data, mode)


def read_small(path: Path, way_out: str) -> bytes:
    """Return what a file of keys holds; raises SonoEdgeError, ending in `way_out`, when it is none."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise SonoEdgeError(f"{path} is too long: {way_out}")
        return path.read_bytes()
    except OSError as error:
        raise SonoEdgeError(f"{path} cannot be read ({error.strerror}): {way_out}") from error


def require_private(path: Path) -> None:
    """Raise SonoEdgeError when others than its owner may read a secret key."""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise SonoEdgeError(f"{path} can be read by others than its owner: run `chmod 600 {path}`")


def _write(path: Path, data: bytes, mode: int) -> None:
    """Create a file that is never, not even for a moment, open to more than `mode`, nor there in part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(partial, path)  # unlike a rename, never replaces what appeared meanwhile
    finally:
        partial.unlink(missing_ok=True)
