"""Who vouches for a bundle: an Ed25519 signature over the bytes of its `manifest.json`, in a file beside it.

The manifest holds the SHA-256 of every file, so one signature covers all but the engines, which the device makes.
"""

import os
import stat
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Literal

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.manifest import MANIFEST_FILE, SIGNATURE_FILE

TRUSTED_KEYS = Path("/etc/sonoedge/trusted-keys")
SECRET_SUFFIX = ".pem"
PUBLIC_SUFFIX = ".pub"
_LARGEST_FILE_BYTES = 16 * 1024


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `manifest.json.sig` says: 64 bytes over the manifest by the holder of a key of 32, both in base64."""

    key: str
    signature: str
    format_version: int = 1


class Signer(msgspec.Struct, frozen=True):
    """Who signed a bundle; `name` is what the folder of trusted keys calls the key, None when it is not there."""

    state: Literal["unsigned", "trusted", "untrusted"]
    key: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        """Say it in words."""
        match self.state:
            case "unsigned":
                return "signed by nobody"
            case "trusted":
                return f"signed by {self.name}, whom this machine trusts"
            case "untrusted":
                return f"signed with the key {self.key}, which is not among the trusted ones"


def make_signing_key(stem: Path) -> str:
    """Write a new pair to `stem`.pem, for its owner only, and `stem`.pub, and return the public key in base64."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
    )

    secret = Ed25519PrivateKey.generate()
    files = (
        (SECRET_SUFFIX, secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600),
        (PUBLIC_SUFFIX, secret.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644),
    )
    for suffix, _, _ in files:
        if (path := stem.with_name(stem.name + suffix)).exists():
            raise SonoEdgeError(f"{path} exists: a key in use is never overwritten, give another name")
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, data, mode in files:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(stem.with_name(stem.name + suffix), flags, mode), "wb") as file:
            file.write(data)
    return b64encode(secret.public_key().public_bytes_raw()).decode()


def sign_manifest(root: Path, key: Path) -> Signature:
    """Sign the bundle at `root`, whose files must have been checked, with the secret key in a PEM file."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    way_out = "give an Ed25519 key in PEM, such as `sonoedge keys make --signing` writes"
    data = _read(key, way_out)
    if stat.S_IMODE(key.stat().st_mode) & 0o077:
        raise SonoEdgeError(f"{key} can be read by others than its owner: run `chmod 600 {key}`")
    try:
        secret = load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as error:
        raise SonoEdgeError(f"{key} holds no secret key that can be read without a password: {way_out}") from error
    if not isinstance(secret, Ed25519PrivateKey):
        raise SonoEdgeError(f"{key} holds a key of another kind: {way_out}")
    manifest = (root / MANIFEST_FILE).read_bytes()
    signature = Signature(
        b64encode(secret.public_key().public_bytes_raw()).decode(), b64encode(secret.sign(manifest)).decode()
    )
    partial = root.parent / f".{root.name}.{SIGNATURE_FILE}.partial"  # never inside, where it would be an unlisted file
    with partial.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(signature), indent=2) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(root / SIGNATURE_FILE)
    return signature


def read_signer(root: Path, manifest: bytes, trusted: Path | None) -> Signer:
    """Say who signed these bytes of a manifest; `trusted` is a folder of `NAME.pub` files, None: nobody is trusted.

    Raises SonoEdgeError for a signature that cannot be read or belongs to other bytes.
    """
    path = root / SIGNATURE_FILE
    if not path.exists():
        return Signer("unsigned")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    way_out = "copy the bundle again, or remove that file and sign it anew"
    try:
        found = msgspec.json.decode(_read(path, way_out), type=Signature)
        raw, signature = b64decode(found.key, validate=True), b64decode(found.signature, validate=True)
        public = Ed25519PublicKey.from_public_bytes(raw)
    except (msgspec.DecodeError, ValueError) as error:
        raise SonoEdgeError(f"{SIGNATURE_FILE} cannot be read ({error}): {way_out}") from error
    if found.format_version != 1:
        raise SonoEdgeError(f"{SIGNATURE_FILE} has format_version {found.format_version}, not 1: {way_out}")
    try:
        public.verify(signature, manifest)
    except InvalidSignature as error:
        raise SonoEdgeError(f"{SIGNATURE_FILE} does not belong to this {MANIFEST_FILE}: {way_out}") from error
    key = b64encode(raw).decode()
    name = None if trusted is None else trusted_keys(trusted).get(key)
    return Signer("untrusted" if name is None else "trusted", key, name)


def require_trusted(signer: Signer, trusted: Path | None) -> None:
    """Raise SonoEdgeError unless a trusted key signed the bundle."""
    if signer.state != "trusted":
        where = f"a key in {trusted}" if trusted is not None else "a key in a folder given with --trusted"
        raise SonoEdgeError(f"the bundle is {signer}: sign it with {where}, or set require_signature = false")


def trusted_keys(folder: Path) -> dict[str, str]:
    """Return the keys of a folder, public key in base64 → file name without `.pub`; an absent folder has none."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    keys: dict[str, str] = {}
    for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}")):
        way_out = "remove it, or copy there a .pub file that `sonoedge keys make --signing` wrote"
        try:
            public = load_pem_public_key(_read(path, way_out))
        except ValueError as error:
            raise SonoEdgeError(f"{path} holds no public key: {way_out}") from error
        if not isinstance(public, Ed25519PublicKey):
            raise SonoEdgeError(f"{path} holds a key of another kind than Ed25519: {way_out}")
        keys[b64encode(public.public_bytes_raw()).decode()] = path.stem
    return keys


def run(bundle: Path, key: Path, as_json: bool) -> None:
    """Check every file of the bundle, then sign it; raises SonoEdgeError naming what differs."""
    from sonoedge.bundle import open_bundle

    opened = open_bundle(bundle, ignore_signature=True)
    signature = sign_manifest(opened.root, key)
    if as_json:
        print(msgspec.json.encode({"signed": str(bundle), "key": signature.key}).decode())
        return
    print(f"{bundle / SIGNATURE_FILE}: {len(opened.manifest.files)} files signed with the key {signature.key}")


def _read(path: Path, way_out: str) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_FILE_BYTES:
            raise SonoEdgeError(f"{path} is too long: {way_out}")
        return path.read_bytes()
    except OSError as error:
        raise SonoEdgeError(f"{path} cannot be read ({error.strerror}): {way_out}") from error
