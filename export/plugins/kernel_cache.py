"""Compiled kernels kept between runs, each under the hash of all that it was made from."""

import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins.compile import Compiled, Source, compile_options, compile_source
from sonoedge.export.plugins.ptxas import Usage, measure

_FORMAT_VERSION = 1  # of an entry, and of what is done to Triton's PTX


class Built(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A compiled kernel with what the assembler says of it."""

    compiled: Compiled
    usage: Usage


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one file of the cache holds; the hash tells a damaged one."""

    sha256: str
    built: Built


def cache_folder() -> Path:
    """Return the user's folder of compiled kernels; XDG_CACHE_HOME moves it, as for other programs."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    return base / "sonoedge" / "kernels"


def build(source: Source, sm: int, ptx_version: int, folder: Path) -> Built:
    """Return the kernel from the cache in `folder`, or compile, measure and keep it.

    Raises SonoEdgeError when the folder cannot be written, and what compiling and measuring raise.
    """
    path = folder / f"{content_key(source, sm, ptx_version)}.json"
    kept = _read(path)
    if kept is not None:
        return kept
    compiled = compile_source(source, sm, ptx_version)
    built = Built(compiled, measure(compiled.ptx, sm))
    _write(path, built)
    return built


def content_key(source: Source, sm: int, ptx_version: int) -> str:
    """Return the SHA-256 of a kernel's source with its helpers, types and constants, the compiler and the target."""
    import triton

    parts = (
        _FORMAT_VERSION,
        triton.__version__,
        sm,
        compile_options(source, ptx_version),
        source.function.cache_key,  # Triton's hash of the source, the functions that it calls and the globals it reads
        source.parameters,
        source.constants,
    )
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _read(path: Path) -> Built | None:
    """Return a whole entry; None for a missing or damaged one, which is then built again."""
    try:
        entry = msgspec.json.decode(path.read_bytes(), type=_Entry)
    except (FileNotFoundError, msgspec.DecodeError):  # a wrong shape is a DecodeError too
        return None
    except OSError as error:
        raise _unusable(path.parent, error) from error
    return entry.built if entry.sha256 == _digest(entry.built) else None


def _write(path: Path, built: Built) -> None:
    """Put an entry in place in one step, so that runs beside each other see a whole one or none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(_Entry(_digest(built), built)))
            Path(draft).replace(path)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _unusable(path.parent, error) from error


def _digest(built: Built) -> str:
    return hashlib.sha256(msgspec.json.encode(built)).hexdigest()


def _unusable(folder: Path, error: OSError) -> SonoEdgeError:
    return SonoEdgeError(
        f"{folder}, where compiled kernels are kept, cannot be used ({error.strerror}): free it, or set XDG_CACHE_HOME"
    )
