"""CURVE keys in files: a pair for one end, the server's public key for a client, the folder of admitted clients.

The files are ZeroMQ certificates, which pyzmq and czmq read: `NAME.key` holds a public key of 40 Z85 characters,
`NAME.key_secret` the secret one too (https://rfc.zeromq.org/spec/32/, https://rfc.zeromq.org/spec/26/).
"""

import re
from pathlib import Path

import msgspec
import zmq
from zmq.auth import load_certificate

from sonoedge.errors import SonoEdgeError
from sonoedge.key_storage import FOR_ALL, FOR_OWNER, read_small, require_private, write_new

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"
_KEY = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_NAME = re.compile(r"[\w][\w.-]{0,63}")


class KeyPair(msgspec.Struct, frozen=True):
    """One end's keys, in Z85."""

    public: str
    secret: str


class ServerKeys(msgspec.Struct, frozen=True):
    """What a server needs to be reachable by others: its own keys and the folder of the clients it admits."""

    pair: KeyPair
    allow: Path


class ClientKeys(msgspec.Struct, frozen=True):
    """What a client needs to reach such a server: its own keys and the server's public one."""

    pair: KeyPair
    server: str


def make_pair(stem: Path) -> KeyPair:
    """Write a new pair to `stem`.key and `stem`.key_secret, for their owner only; raises SonoEdgeError if one is."""
    public, secret = (key.decode() for key in zmq.curve_keypair())
    write_new(
        {
            stem.with_name(stem.name + SECRET_SUFFIX): (_certificate(public, secret), FOR_OWNER),
            stem.with_name(stem.name + PUBLIC_SUFFIX): (_certificate(public), FOR_OWNER),
        }
    )
    return KeyPair(public, secret)


def read_pair(path: Path) -> KeyPair:
    """Read a `.key_secret` file; raises SonoEdgeError when it holds no pair or others may read it."""
    public, secret = _load(path)
    if secret is None:
        raise SonoEdgeError(
            f"{path} holds no secret key: give the {SECRET_SUFFIX} file that `sonoedge keys make` wrote"
        )
    require_private(path)
    if zmq.curve_public(secret.encode()).decode() != public:
        raise SonoEdgeError(f"{path}: its public key does not belong to its secret one: make a new pair")
    return KeyPair(public, secret)


def read_public(key: str) -> str:
    """Return a public key given as such or as the file that holds it; raises SonoEdgeError when it is neither."""
    return key if _KEY.fullmatch(key) and not Path(key).is_file() else _load(Path(key))[0]


def server_keys(key: Path | None, allow: Path | None) -> ServerKeys | None:
    """Read what makes a server reachable by others; None without both; raises SonoEdgeError when one lacks."""
    if key is None and allow is None:
        return None
    if key is None or allow is None:
        missing, why = ("a server key", "encrypt") if key is None else ("an allow-list", "know whom to admit")
        raise SonoEdgeError(f"{missing} is missing, without which nothing can {why}: give both (see `sonoedge keys`)")
    if not allow.is_dir():
        raise SonoEdgeError(f"{allow} is no folder of client keys: run `sonoedge keys allow {allow} CLIENT_KEY`")
    return ServerKeys(read_pair(key), allow)


def client_keys(key: Path | None, server_key: str | None) -> ClientKeys | None:
    """Read what reaches a server with keys; None without both; raises SonoEdgeError when one lacks."""
    if key is None and server_key is None:
        return None
    if key is None or server_key is None:
        missing = "--key" if key is None else "--server-key"
        raise SonoEdgeError(f"{missing} is missing: a server with keys needs --key and --server-key, another neither")
    return ClientKeys(read_pair(key), read_public(server_key))


def allow_client(folder: Path, key: str, name: str | None = None) -> str:
    """Add a client's public key to an allow-list folder, made if it is not there, and return its name."""
    public = read_public(key)
    name = name or (Path(key).stem if Path(key).is_file() else f"client-{public[:8]}")
    name = re.sub(r"[^\w.-]", "_", name)
    if not _NAME.fullmatch(name):
        raise SonoEdgeError(f"{name!r} is no name for a client: use letters, digits, - and _, give one with --name")
    listed = allowed_clients(folder) if folder.is_dir() else {}
    if public in listed:
        raise SonoEdgeError(f"{folder} lists that key already, as {listed[public]}: nothing to do")
    path = folder / (name + PUBLIC_SUFFIX)
    if path.exists():
        raise SonoEdgeError(f"{path} exists and holds another key: give another --name, or remove it first")
    write_new({path: (_certificate(public), FOR_ALL)})
    return name


def remove_client(folder: Path, name: str) -> None:
    """Take a client off an allow-list by its name or its key; raises SonoEdgeError when it is not there."""
    names = {name, *(known for key, known in read_clients(folder)[0].items() if key == name)}
    gone = [path for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}")) if path.stem in names]
    if not gone:
        raise SonoEdgeError(f"{folder} lists no {name!r}: see `sonoedge keys list {folder}`")
    for path in gone:
        path.unlink()


def allowed_clients(folder: Path) -> dict[str, str]:
    """Return the admitted clients, public key → name; raises SonoEdgeError for a file that holds no key."""
    clients, problems = read_clients(folder)
    if problems:
        raise SonoEdgeError(problems[0])
    return clients


def read_clients(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Return the admitted clients, public key → name, and what could not be read and so admits nobody."""
    clients: dict[str, str] = {}
    problems: list[str] = []
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == PUBLIC_SUFFIX)
    except OSError as error:
        return {}, [f"{folder} cannot be read ({error.strerror}): nobody is admitted until it can"]
    for path in paths:
        key = _load_or_say(path, problems)
        if key is not None:
            clients[key] = path.stem
    return clients, problems


def _load_or_say(path: Path, problems: list[str]) -> str | None:
    try:
        return _load(path)[0]
    except SonoEdgeError as error:
        problems.append(str(error))
        return None


def _load(path: Path) -> tuple[str, str | None]:
    """Return the public key and, where the file has one, the secret key."""
    way_out = "give a key of 40 characters, or a file that `sonoedge keys make` wrote"
    read_small(path, way_out)
    try:
        public, secret = load_certificate(path)
    except ValueError as error:
        raise SonoEdgeError(f"{path} holds no key: {way_out}") from error
    texts = [key.decode("ascii", "replace") for key in (public, secret) if key is not None]
    if not all(_KEY.fullmatch(text) for text in texts):
        raise SonoEdgeError(f"{path} holds a key that is not 40 Z85 characters long: {way_out}")
    return texts[0], texts[1] if secret is not None else None


def _certificate(public: str, secret: str | None = None) -> bytes:
    lines = ["metadata", "curve", f'    public-key = "{public}"']
    if secret is not None:
        lines.append(f'    secret-key = "{secret}"')
    return ("\n".join(lines) + "\n").encode("ascii")
