"""The verb `keys`: make CURVE keys, show a public one, and keep the list of clients that a server admits."""

import sys
from pathlib import Path

import msgspec

from sonoedge.runtime.key_files import (
    PUBLIC_SUFFIX,
    SECRET_SUFFIX,
    allow_client,
    allowed_clients,
    make_pair,
    read_public,
    remove_client,
)
from sonoedge.signing import PUBLIC_SUFFIX as SIGNING_PUBLIC_SUFFIX
from sonoedge.signing import SECRET_SUFFIX as SIGNING_SUFFIX
from sonoedge.signing import make_signing_key


def make(stem: Path, as_json: bool, signing: bool = False) -> None:
    """Make a pair for a server or a client, or (`signing`) to sign bundles with; raises SonoEdgeError if it exists."""
    key = make_signing_key(stem) if signing else make_pair(stem).public
    suffixes = (SIGNING_SUFFIX, SIGNING_PUBLIC_SUFFIX) if signing else (SECRET_SUFFIX, PUBLIC_SUFFIX)
    secret, public = (str(stem.with_name(stem.name + suffix)) for suffix in suffixes)
    if as_json:
        _say({"public": key, "secret_file": secret, "public_file": public})
        return
    print(f"{secret}: keep it to yourself\n{public}: give it to the other end\npublic key {key}")


def show(key: str, as_json: bool) -> None:
    """Print the public key in a file."""
    public = read_public(key)
    if as_json:
        _say({"public": public})
        return
    print(public)


def allow(folder: Path, key: str, name: str | None, as_json: bool) -> None:
    """Put a client on an allow-list; a running server admits it at its next handshake."""
    name = allow_client(folder, key, name)
    if as_json:
        _say({"allowed": name, "folder": str(folder)})
        return
    print(f"{folder} now admits {name}")


def list_clients(folder: Path, as_json: bool) -> None:
    """Print who is on an allow-list."""
    clients = allowed_clients(folder)
    if as_json:
        _say({"clients": {name: key for key, name in clients.items()}, "folder": str(folder)})
        return
    for key, name in clients.items():
        print(f"{key}  {name}")
    if not clients:
        print(f"{folder} admits nobody", file=sys.stderr)


def remove(folder: Path, name: str, as_json: bool) -> None:
    """Take a client off an allow-list; a running server turns it out within a second."""
    remove_client(folder, name)
    if as_json:
        _say({"removed": name, "folder": str(folder)})
        return
    print(f"{folder} no longer admits {name}")


def _say(line: dict[str, object]) -> None:
    print(msgspec.json.encode(line).decode())
