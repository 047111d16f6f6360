"""The timing cache: what a builder measured of each tactic, kept so that the next build need not measure again."""

from pathlib import Path
from typing import Any

from sonoedge.export.engines.library import Library

TIMING_CACHE = "timing.cache"


def open_timing_cache(library: Library, config: Any, path: Path | None) -> Any:
    """Give the build the cache at `path`, or an empty one where there is none for this GPU and library.

    None for TensorRT-RTX, which measures nothing when it builds.
    """
    if path is None or library.name == "tensorrt_rtx":
        return None
    kept = path.read_bytes() if path.exists() else b""
    for content in (kept, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):  # one of another GPU or version is refused
            return cache
    return None


def save_timing_cache(cache: Any, path: Path | None) -> None:
    """Write what the build added to it."""
    if cache is not None and path is not None:
        path.write_bytes(memoryview(cache.serialize()))
