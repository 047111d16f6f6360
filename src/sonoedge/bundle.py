"""The bundle, the folder that both halves share: `BundleWriter` makes one, `open_bundle` checks and reads one."""

import hashlib
import os
from pathlib import Path, PurePosixPath

import msgspec

from sonoedge.bundle_writer import BundleWriter
from sonoedge.errors import SonoEdgeError
from sonoedge.manifest import (
    ENGINES_FOLDER,
    FORMAT_VERSION,
    GOLDEN_FOLDER,
    GRAPHS_FOLDER,
    HINT_SCHEMA_FILE,
    MANIFEST_FILE,
    SIGNATURE_FILE,
    TOKENIZER_FILE,
    Contents,
    DecoderSpec,
    ExpertsSpec,
    FileEntry,
    Golden,
    Graph,
    Hashes,
    HintCalibration,
    ImageSpec,
    Manifest,
    Model,
    StageCost,
    decode_manifest,
)
from sonoedge.signing import Signer, read_signer
from sonoedge.trust import require_trusted, trusted_keys

__all__ = [
    "ENGINES_FOLDER",
    "FORMAT_VERSION",
    "GOLDEN_FOLDER",
    "GRAPHS_FOLDER",
    "HINT_SCHEMA_FILE",
    "MANIFEST_FILE",
    "TOKENIZER_FILE",
    "Bundle",
    "BundleWriter",
    "Contents",
    "DecoderSpec",
    "ExpertsSpec",
    "FileEntry",
    "Golden",
    "Graph",
    "Hashes",
    "HintCalibration",
    "ImageSpec",
    "Manifest",
    "Model",
    "StageCost",
    "open_bundle",
]

_LARGEST_MANIFEST_BYTES = 16 * 2**20
_CHUNK_BYTES = 2**20


class Bundle(msgspec.Struct, frozen=True):
    """A bundle whose every file has been checked."""

    root: Path
    manifest: Manifest
    signer: Signer = Signer("unsigned")

    def path(self, name: str) -> Path:
        """Return where a listed file is; raises SonoEdgeError for one that the manifest does not list."""
        if name not in self.manifest.files:
            raise SonoEdgeError(f"{self.root}: {MANIFEST_FILE} lists no {name}: build the bundle again")
        return self.root / name

    def find_graph(self, purpose: str, formulation: str) -> Path | None:
        """Return the graph made for a purpose in a formulation, None when the bundle does without."""
        for graph in self.manifest.graphs:
            if (graph.purpose, graph.formulation) == (purpose, formulation):
                return self.path(graph.path)
        return None

    def graph(self, purpose: str, formulation: str) -> Path:
        """Return the graph made for a purpose in a formulation; raises SonoEdgeError when the bundle has none."""
        found = self.find_graph(purpose, formulation)
        if found is not None:
            return found
        raise SonoEdgeError(f"{self.root}: no {purpose} graph in the formulation {formulation}: build the bundle again")


def open_bundle(
    path: Path, *, trusted: Path | None = None, require_signature: bool = False, ignore_signature: bool = False
) -> Bundle:
    """Check every byte of the bundle at `path` and return it.

    trusted: folder of the public keys that are trusted, as for `trusted_keys`. require_signature: refuse a bundle that
    none of them signed, before any of its files is read. ignore_signature: take it as unsigned, to sign it again.

    Raises SonoEdgeError naming the file: no bundle, an unreadable or newer manifest, a file that is changed, missing,
    unlisted (outside engines/), a link or outside the folder, a signature that does not belong to the manifest.
    """
    # A scanner's `current` may be a link to the bundle in use: the folder that it names now is the one that is served.
    root = path.resolve()
    if not (root / MANIFEST_FILE).is_file():
        reason = f"it has no {MANIFEST_FILE}" if root.is_dir() else "no such folder"
        raise SonoEdgeError(f"{path} is not a bundle, {reason}: make one with `sonoedge build`")
    try:
        if (root / MANIFEST_FILE).stat().st_size > _LARGEST_MANIFEST_BYTES:
            raise SonoEdgeError(f"{MANIFEST_FILE} is over {_LARGEST_MANIFEST_BYTES} bytes long: build the bundle again")
        data = (root / MANIFEST_FILE).read_bytes()
        signer = Signer("unsigned") if ignore_signature else read_signer(root, data, trusted_keys(trusted))
        if require_signature:
            require_trusted(signer, trusted)
        manifest = decode_manifest(data)
        _check_unlisted(root, manifest)
        for name, entry in manifest.files.items():
            _check_file(root, name, entry)
    except SonoEdgeError as error:
        raise SonoEdgeError(f"{path}: {error}") from error
    except OSError as error:
        raise SonoEdgeError(
            f"{path}: {error.filename or 'the bundle'} cannot be read ({error.strerror}): copy the bundle again"
        ) from error
    return Bundle(root, manifest, signer)


def _check_unlisted(root: Path, manifest: Manifest) -> None:
    """Refuse links anywhere and files that the manifest does not list, engines aside."""
    own = (MANIFEST_FILE, SIGNATURE_FILE)
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        here = Path(folder).relative_to(root)
        for name in (*subfolders, *names):
            relative = str(PurePosixPath(here / name))
            if (root / relative).is_symlink():
                raise SonoEdgeError(f"{relative} is a link, which a bundle may not hold: copy the bundle again")
            if name in names and relative not in manifest.files and relative not in own:
                raise SonoEdgeError(f"{relative} is not listed in {MANIFEST_FILE}: remove it, or copy the bundle again")
        if here == Path() and ENGINES_FOLDER in subfolders:
            subfolders.remove(ENGINES_FOLDER)


def _check_file(root: Path, name: str, entry: FileEntry) -> None:
    """Refuse a file that is missing or differs from its entry."""
    path = root / name
    if not path.is_file():
        raise SonoEdgeError(f"{name} is missing: copy the bundle again")
    if path.stat().st_size != entry.bytes:
        raise SonoEdgeError(f"{name} is {path.stat().st_size} bytes long, not {entry.bytes}: copy the bundle again")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != entry.sha256:
        raise SonoEdgeError(f"{name} has changed since the bundle was built (SHA-256 differs): copy the bundle again")


def _raise(error: OSError) -> None:
    raise error
