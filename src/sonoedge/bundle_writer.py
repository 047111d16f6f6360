"""Writes a bundle beside its final place and renames it when complete, so that no half-written one ever exists."""

import contextlib
import datetime
import hashlib
import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

import msgspec

from sonoedge import __version__
from sonoedge.errors import DISK_FULL, SonoEdgeError
from sonoedge.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Contents,
    FileEntry,
    Manifest,
    check_agreement,
    check_name,
    encode_manifest,
    model_id,
)

_CHUNK_BYTES = 2**20


class BundleWriter:
    """Collects the files of a bundle: enter, write to the paths that `add` gives, `commit`; else nothing is left.

    Raises SonoEdgeError when `out` exists and is no empty folder, when it cannot be written and when the disk is full.
    """

    def __init__(self, out: Path, folder: Path | None = None) -> None:
        """`out` is the folder to make; `folder`, on the same disk, is where its files are until it is complete."""
        self.out = out
        self._folder = folder or out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
        self._added: set[str] = set()
        self._made: list[Path] = []  # folders above `out` that did not exist, outermost first
        self._committed = False

    def __enter__(self) -> "BundleWriter":
        """Make the temporary folder."""
        self._refuse_existing()
        self._made = [parent for parent in reversed(self.out.parents) if not parent.exists()]
        try:
            self._folder.mkdir(parents=True)
        except OSError as error:
            self._remove()
            raise SonoEdgeError(f"{self.out} cannot be written ({error.strerror}): choose another --out") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave nothing behind unless the bundle is complete; a full disk is told as such."""
        if self._committed:
            return
        self._remove()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise SonoEdgeError(f"{self.out}: the disk is full: free space, or choose another --out") from error

    def add(self, name: str) -> Path:
        """Return where to write the file `name`, a path relative to the bundle such as "graphs/vision.onnx"."""
        check_name(name)
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._added.add(name)
        return path

    def commit(self, contents: Contents) -> Manifest:
        """Hash every file, write the manifest and give the bundle its name."""
        files = {name: self._entry(name) for name in self._names()}
        if unwritten := sorted(self._added - set(files)):
            raise SonoEdgeError(
                f"{self.out}: {unwritten[0]} was announced and never written: this is a defect, report it"
            )
        check_agreement(contents, files)
        described = msgspec.structs.asdict(contents)
        described["model"] = msgspec.structs.replace(contents.model, id=model_id(contents.graphs, files))
        manifest = Manifest(
            **described,
            format_version=FORMAT_VERSION,
            created=datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0),
            tool_version=__version__,
            files=files,
        )
        with (self._folder / MANIFEST_FILE).open("wb") as file:
            file.write(encode_manifest(manifest))
            file.flush()
            os.fsync(file.fileno())
        for folder, _, _ in os.walk(self._folder):
            _sync_folder(Path(folder))
        self._refuse_existing()
        self._folder.rename(self.out)
        self._committed = True
        _sync_folder(self.out.parent)
        return manifest

    def _names(self) -> list[str]:
        """Every file in the temporary folder, those beside an added one (external weights) included."""
        found: list[str] = []
        for path in sorted(self._folder.rglob("*")):
            name = path.relative_to(self._folder).as_posix()
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise SonoEdgeError(f"{self.out}: {name} is neither a file nor a folder: write its content instead")
            if path.is_file():
                check_name(name)
                found.append(name)
        return found

    def _entry(self, name: str) -> FileEntry:
        """Hash a file and push it to the disk, so that the rename never overtakes its content."""
        digest = hashlib.sha256()
        size = 0
        with (self._folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
            os.fsync(file.fileno())
        return FileEntry(sha256=digest.hexdigest(), bytes=size)

    def _refuse_existing(self) -> None:
        if self.out.is_symlink() or (self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir()))):
            raise SonoEdgeError(f"{self.out} exists: remove it, or choose another --out")

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):  # another program may have put something there meanwhile
                parent.rmdir()


def _sync_folder(folder: Path) -> None:
    """Push a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
