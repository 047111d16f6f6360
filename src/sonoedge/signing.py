"""Who vouches for a bundle: an Ed25519 signature over the bytes of its `manifest.json`, in a file beside it.

The manifest holds the SHA-256 of every file, so one signature covers all but the engines, which the device makes.
"""

import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.key_storage import FOR_ALL, FOR_OWNER, read_small, require_private, write_new
from sonoedge.manifest import MANIFEST_FILE, SIGNATURE_FILE

SECRET_SUFFIX = ".pem"
PUBLIC_SUFFIX = ".pub"


class Signature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `manifest.json.sig` says: 64 bytes over the manifest by the holder of a key of 32, both in base64."""

    key: str
    signature: str
    format_version: int = 1


class Signer(msgspec.Struct, frozen=True):
    """Who signed a bundle; `name` is what the key is called here, None when it is not trusted."""

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
    private = secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    public = secret.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    write_new(
        {
            stem.with_name(stem.name + SECRET_SUFFIX): (private, FOR_OWNER),
            stem.with_name(stem.name + PUBLIC_SUFFIX): (public, FOR_ALL),
        }
    )
    return b64encode(secret.public_key().public_bytes_raw()).decode()


def sign_manifest(root: Path, key: Path) -> Signature:
    """Sign the bundle at `root`, whose files must have been checked, with the secret key in a PEM file."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    way_out = "give an Ed25519 key in PEM, such as `sonoedge keys make --signing` writes"
    data = read_small(key, way_out)
    require_private(key)
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


def read_signer(root: Path, manifest: bytes, trusted: Mapping[str, str]) -> Signer:
    """Say who signed these bytes of a manifest; `trusted` are the keys, public key in base64 → name.

    Raises SonoEdgeError for a signature that cannot be read or belongs to other bytes.
    """
    path = root / SIGNATURE_FILE
    if not path.exists():
        return Signer("unsigned")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    way_out = "copy the bundle again, or remove that file and sign it anew"
    try:
        found = msgspec.json.decode(read_small(path, way_out), type=Signature)
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
    name = trusted.get(key)
    return Signer("untrusted" if name is None else "trusted", key, name)


def run(bundle: Path, key: Path, as_json: bool) -> None:
    """Check every file of the bundle, then sign it; raises SonoEdgeError naming what differs."""
    from sonoedge.bundle import open_bundle

    opened = open_bundle(bundle, ignore_signature=True)
    signature = sign_manifest(opened.root, key)
    if as_json:
        print(msgspec.json.encode({"signed": str(bundle), "key": signature.key}).decode())
        return
    print(f"{bundle / SIGNATURE_FILE}: {len(opened.manifest.files)} files signed with the key {signature.key}")
