"""Binding ZeroMQ sockets: the limits that every one of them gets, and which endpoints are allowed."""

import ipaddress
import re
import socket
from pathlib import Path
from typing import Any

import zmq

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.protocol import MAX_WIRE_BYTES

HIGH_WATER_MARK = 1000  # messages a peer may lag behind before its own are dropped
HEARTBEAT_MS = 2000
LINGER_MS = 300  # how long a closing socket waits to deliver its last messages


def limit(sock: zmq.Socket[bytes]) -> None:
    """Set every limit that a socket of the server needs."""
    sock.set(zmq.LINGER, LINGER_MS)
    sock.set(zmq.MAXMSGSIZE, MAX_WIRE_BYTES)
    sock.set(zmq.SNDHWM, HIGH_WATER_MARK)
    sock.set(zmq.RCVHWM, HIGH_WATER_MARK)
    sock.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    sock.set(zmq.HEARTBEAT_TIMEOUT, 3 * HEARTBEAT_MS)
    sock.set(zmq.HEARTBEAT_TTL, 5 * HEARTBEAT_MS)


def bind(sock: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind and return the endpoint with its port filled in; raises SonoEdgeError when it is open to others or taken."""
    check_endpoint(endpoint)
    try:
        sock.bind(endpoint)
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            raise _taken(endpoint) from error
        raise SonoEdgeError(f"cannot bind {endpoint} ({error}): give another endpoint") from error
    return sock.get_string(zmq.LAST_ENDPOINT).rstrip("\0")


def check_endpoint(endpoint: str) -> None:
    """Raise SonoEdgeError unless the endpoint is only reachable from this machine and not in use."""
    if endpoint.startswith("ipc://"):
        _check_ipc(endpoint)
        return
    match = re.fullmatch(r"tcp://(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d+|\*)", endpoint)
    if match is None:
        raise SonoEdgeError(f"{endpoint!r} is no endpoint: write it like tcp://127.0.0.1:5555 or ipc:///run/sonoedge")
    host = match["six"] or match["host"]
    if host != "localhost" and not _is_loopback(host):
        raise SonoEdgeError(
            f"{endpoint} can be reached from other machines, and encryption (CURVE) is not built yet: "
            "bind tcp://127.0.0.1 and forward it through a secure tunnel"
        )


def connect(kind: int, endpoint: str, **options: int) -> zmq.Socket[Any]:
    """Return a client's socket connected to `endpoint`; raises SonoEdgeError when it is no endpoint."""
    sock: zmq.Socket[Any] = zmq.Context.instance().socket(kind)
    limit(sock)
    sock.set(zmq.LINGER, 0)
    for name, value in options.items():
        sock.set(getattr(zmq, name), value)
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
