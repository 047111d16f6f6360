"""`sonoedge verify`: is a bundle whole and unchanged, and does it still give the outputs recorded when it was built?"""

from pathlib import Path
from typing import Literal

import msgspec

from sonoedge.bundle import open_bundle
from sonoedge.signing import Signer


class Verified(msgspec.Struct, frozen=True):
    """What was checked; `golden_error` is the largest difference from the recorded outputs."""

    verified: bool
    model: str
    files: int
    bytes: int
    golden_error: float
    golden_bound: float
    signature: Signer


def run(
    path: Path,
    *,
    as_json: bool,
    backend: Literal["tensorrt", "cuda", "cpu"] | None = None,
    trusted: Path | None = None,
) -> None:
    """Check and report; raises SonoEdgeError naming what differs. `backend` None: the one of the bundle's profile.

    trusted: folder of the public keys whose signature is reported as trusted, as for `trusted_keys`.
    """
    bundle = open_bundle(path, trusted=trusted)
    # Hashes are checked before a backend is loaded: a changed graph is never run.
    from sonoedge.runtime import golden

    result = Verified(
        verified=True,
        model=bundle.manifest.model.id,
        files=len(bundle.manifest.files),
        bytes=sum(entry.bytes for entry in bundle.manifest.files.values()),
        golden_error=golden.check(bundle, backend),
        golden_bound=bundle.manifest.golden.bound,
        signature=bundle.signer,
    )
    if as_json:
        print(msgspec.json.encode(result).decode())
        return
    print(f"{path}: {result.files} files, {result.bytes / 1e6:.1f} MB, every SHA-256 as built")
    print(f"model {result.model}, {result.signature}")
    print(f"recorded outputs: largest difference {result.golden_error:.2g}, allowed {result.golden_bound:.2g}")
