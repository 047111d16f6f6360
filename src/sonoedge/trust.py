"""Whose signature on a bundle this machine trusts: a folder's keys, by default the machine's and the account's own."""

from base64 import b64encode
from pathlib import Path

from sonoedge.development_key import NAME, own_public_key
from sonoedge.errors import SonoEdgeError
from sonoedge.key_storage import read_small
from sonoedge.signing import PUBLIC_SUFFIX, Signer

TRUSTED_KEYS = Path("/etc/sonoedge/trusted-keys")


def trusted_keys(folder: Path | None) -> dict[str, str]:
    """Return the keys that are trusted, public key in base64 → name.

    folder: of `NAME.pub` files, and nothing else is trusted; an absent one has none. None: the machine's folder, and
    the key that this account signs with what it builds. Raises SonoEdgeError naming a file that holds no key.
    """
    if folder is not None:
        return _of_folder(folder)
    own = own_public_key()
    return _of_folder(TRUSTED_KEYS) | ({} if own is None else {_public_key(own): NAME})


def require_trusted(signer: Signer, folder: Path | None) -> None:
    """Raise SonoEdgeError unless a trusted key signed the bundle; `folder` as for `trusted_keys`."""
    if signer.state != "trusted":
        raise SonoEdgeError(
            f"the bundle is {signer}: sign it with a key whose .pub file is in {folder or TRUSTED_KEYS}, "
            "or serve it all the same with --allow-untrusted (allow_untrusted = true)"
        )


def _of_folder(folder: Path) -> dict[str, str]:
    return {_public_key(path): path.stem for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}"))}


def _public_key(path: Path) -> str:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    way_out = "remove it, or copy there a .pub file that `sonoedge keys make --signing` wrote"
    try:
        public = load_pem_public_key(read_small(path, way_out))
    except ValueError as error:
        raise SonoEdgeError(f"{path} holds no public key: {way_out}") from error
    if not isinstance(public, Ed25519PublicKey):
        raise SonoEdgeError(f"{path} holds a key of another kind than Ed25519: {way_out}")
    return b64encode(public.public_bytes_raw()).decode()
