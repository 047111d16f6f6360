"""A folder that is there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sonoedge.errors import DISK_FULL, SonoEdgeError


@contextmanager
def complete_or_absent(out: Path, needed_bytes: int) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and is removed otherwise.

    Raises SonoEdgeError when `out` is not free or its disk has no `needed_bytes`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SonoEdgeError(f"{out} exists and is not an empty folder: remove it, or choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(out.parent).free
        if free_bytes < needed_bytes:
            raise SonoEdgeError(
                f"{out} needs {needed_bytes / 1e9:.1f} GB and its disk has {free_bytes / 1e9:.1f} GB free: "
                "free space, or choose another --out"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise SonoEdgeError(f"{out} cannot be written ({error.strerror}): choose another --out") from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        partial.rename(out)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise SonoEdgeError(f"{out}: the disk is full: free space, or choose another --out") from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
