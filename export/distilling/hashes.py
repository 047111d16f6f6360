"""Content hashes of what a training run is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

CHUNK = 1 << 24


def files_hash(files: Iterable[Path], *words: str) -> str:
    """SHA-256 of `words` and of the names and contents of files, in their order; names without their folders."""
    digest = hashlib.sha256()
    for word in words:
        digest.update(word.encode() + b"\0")
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint: weights, configuration and tokenizer."""
    return files_hash(sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")))
