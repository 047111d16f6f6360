"""The signing key of whoever builds here: a bundle that was built on this account is served on it, and nowhere else.

Made at the first build and kept with the account's configuration, as Android's debug key is; a device maker signs what
is shipped with a key of their own (`sonoedge sign`), which replaces this signature.
"""

import os
from pathlib import Path

from sonoedge.errors import SonoEdgeError
from sonoedge.signing import PUBLIC_SUFFIX, SECRET_SUFFIX, Signature, make_signing_key, sign_manifest

NAME = "this-account"


def development_key(suffix: str) -> Path | None:
    """Return the file of the account's `suffix` key, whether it is there or not; None for an account without a home."""
    home = os.environ.get("XDG_CONFIG_HOME", "")
    try:
        folder = Path(home) if Path(home).is_absolute() else Path.home() / ".config"
    except RuntimeError:
        return None
    return folder / "sonoedge" / (NAME + suffix)


def sign_for_this_account(root: Path) -> Signature:
    """Sign the bundle at `root`, just written, with the account's key, made when it is not there.

    Raises SonoEdgeError when the key can be neither made nor read.
    """
    secret = development_key(SECRET_SUFFIX)
    way_out = "sign the bundle with a key of your own (`sonoedge keys make --signing`, `sonoedge sign`)"
    if secret is None:
        raise SonoEdgeError(f"this account has no home folder to keep a development key in: {way_out}")
    try:
        if not secret.exists():
            make_signing_key(secret.with_suffix(""))
    except OSError as error:
        raise SonoEdgeError(f"{secret} cannot be made ({error.strerror}): {way_out}") from error
    return sign_manifest(root, secret)


def own_public_key() -> Path | None:
    """Return the public key that this account signs with, None when it has built nothing yet."""
    public = development_key(PUBLIC_SUFFIX)
    return public if public is not None and public.is_file() else None
