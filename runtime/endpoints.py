"""Binding ZeroMQ sockets: the limits that every one of them gets, and which endpoints are allowed."""

import ipaddress
import re
import socket
from pathlib import Path
from typing import Any

import zmq

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.curve import secure_client
from sonoedge.runtime.key_files import ClientKeys
from sonoedge.runtime.protocol import MAX_WIRE_BYTES

HIGH_WATER_MARK = 1000  # messages a peer may lag behind before its own are dropped
REQUESTS_WAITING = 100  # messages of one client that wait unread before it has to wait itself: bounds their memory
HANDSHAKE_MS = 5000  # a peer that has not said who it is by then is cut off
BACKLOG = 512  # peers that connect in the same moment without being told to come again
HEARTBEAT_MS = 2000
SEND_MS = 1000  # a client waits for a connection that takes its request; a refused one never does
LINGER_MS = 300  # how long a closing socket waits to deliver its last messages


def limit(sock: zmq.Socket[bytes]) -> None:
    """Set every limit that a socket of the server needs."""
    sock.set(zmq.LINGER, LINGER_MS)
    sock.set(zmq.MAXMSGSIZE, MAX_WIRE_BYTES)
    sock.set(zmq.SNDHWM, HIGH_WATER_MARK)
    sock.set(zmq.RCVHWM, HIGH_WATER_MARK)
    sock.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    sock.set(zmq.BACKLOG, BACKLOG)
    sock.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.set(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
    sock.set(zmq.HEARTBEAT_TTL, 5 * HEARTBEAT_MS)


def bind(sock: zmq.Socket[bytes], endpoint: str, *, secured: bool = False) -> str:
    """Bind and return the endpoint with its port filled in; raises SonoEdgeError when it is open to others or taken.

    secured: the socket speaks CURVE and has a door, so others may reach it.
    """
    check_endpoint(endpoint, secured=secured)
    if "[" in endpoint:
        sock.set(zmq.IPV6, 1)
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise _taken(endpoint) from error
        raise SonoEdgeError(f"cannot bind {endpoint} ({error}): give another endpoint") from error
    return sock.get_string(zmq.LAST_ENDPOINT).rstrip("\0")


def check_endpoint(endpoint: str, *, secured: bool = False) -> None:
    """Raise SonoEdgeError unless the endpoint is not in use and only reachable from this machine, or secured."""
    if endpoint.startswith("ipc://"):
        _check_ipc(endpoint)
        return
    match = re.fullmatch(r"tcp://(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d+|\*)", endpoint)
    if match is None:
        raise SonoEdgeError(f"{endpoint!r} is no endpoint: write it like tcp://127.0.0.1:5555 or ipc:///run/sonoedge")
    host = match["six"] or match["host"]
    if not secured and host != "localhost" and not _is_loopback(host):
        raise SonoEdgeError(
            f"{endpoint} can be reached from other machines: give --server-key and --allow for CURVE "
            "(`sonoedge keys` makes both), or bind tcp://127.0.0.1"
        )


def connect(
    kind: int,
    endpoint: str,
    keys: ClientKeys | None = None,
    context: zmq.Context[Any] | None = None,
    **options: int,
) -> zmq.Socket[Any]:
    """Return a client's socket connected to `endpoint`; raises SonoEdgeError when it is no endpoint.

    keys: its own and the server's, for a server with CURVE. context: makes the socket; None for the process's own.
    """
    sock: zmq.Socket[Any] = (context or zmq.Context.instance()).socket(kind)
    limit(sock)
    sock.set(zmq.LINGER, 0)
    sock.set(zmq.SNDTIMEO, SEND_MS)
    for name, value in options.items():
        sock.set(getattr(zmq, name), value)
    if keys is not None:
        secure_client(sock, keys)
    try:
        sock.connect(endpoint)
    except zmq.ZMQError as error:
        sock.close()
        raise SonoEdgeError(f"{endpoint!r} is no endpoint ({error}): write it like tcp://127.0.0.1:5555") from error
    return sock


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name or an interface may lead anywhere
        return False


def _check_ipc(endpoint: str) -> None:
    """A bound ipc endpoint would silently be taken from the server that uses it."""
    path = endpoint.removeprefix("ipc://")
    if not path or path == "*":
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect("\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            if Path(path).exists() and not Path(path).is_socket():
                raise SonoEdgeError(f"{endpoint}: {path} is a file: give another path") from None
            return
    raise _taken(endpoint)


def _taken(endpoint: str) -> SonoEdgeError:
    return SonoEdgeError(
        f"{endpoint} is in use, perhaps by another `sonoedge serve`: stop that or give another endpoint"
    )
