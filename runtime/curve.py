"""CURVE on the sockets: what both ends set, and the door that admits only clients on the allow-list.

The door answers libzmq's ZAP requests (https://rfc.zeromq.org/spec/27/) on the thread that owns the sockets.
"""

import contextlib
import time
from collections.abc import Callable, Mapping

import zmq
from zmq.auth import Authenticator

from sonoedge.runtime.key_files import ClientKeys, ServerKeys, read_clients

DOMAIN = "sonoedge"
REREAD_S = 1.0  # how long a client that was taken off the list may still be served
REFUSED_S = 1.0  # between reports of refused keys
REFUSED_AT_ONCE = 100  # keys in one report
_BATCH = 100


def secure_server(sock: zmq.Socket[bytes], keys: ServerKeys) -> None:
    """Make a socket speak CURVE as the server, and nothing else; without a door it admits nobody."""
    sock.set(zmq.CURVE_SERVER, 1)
    sock.set(zmq.CURVE_SECRETKEY, keys.pair.secret.encode())
    sock.set(zmq.CURVE_PUBLICKEY, keys.pair.public.encode())
    sock.set(zmq.ZAP_DOMAIN, DOMAIN.encode())
    sock.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # libzmq admits everyone when no door answers, unless this is set


def secure_client(sock: zmq.Socket[bytes], keys: ClientKeys) -> None:
    """Make a socket speak CURVE as a client that trusts one server."""
    sock.set(zmq.CURVE_SECRETKEY, keys.pair.secret.encode())
    sock.set(zmq.CURVE_PUBLICKEY, keys.pair.public.encode())
    sock.set(zmq.CURVE_SERVERKEY, keys.server.encode())


class Door:
    """Admits clients by their key; the list is read again at every handshake and every second.

    `audit` is told which keys were refused, at most once a second, and which left the list; `on_removed` is called
    after some did, when `answer` or `look` found out.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keys: ServerKeys,
        *,
        audit: Callable[[str, Mapping[str, object]], None],
        on_removed: Callable[[], None],
    ) -> None:
        """Open the door, before the sockets are bound."""
        self._folder = keys.allow
        self._admitted: frozenset[str] = frozenset()
        self._audit, self._on_removed = audit, on_removed
        self._read_due = self._report_due = 0.0
        self._refused: dict[str, int] = {}  # key → times since the last report
        self.problem: str | None = None  # what of the list cannot be read, and so admits nobody
        self._authenticator = Authenticator(context)
        self._authenticator.configure_curve_callback(DOMAIN, self)
        self._authenticator.start()
        self.socket: zmq.Socket[bytes] = self._authenticator.zap_socket
        self._read()

    def answer(self) -> None:
        """Answer the handshakes that wait."""
        for _ in range(_BATCH):
            try:
                request = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            with contextlib.suppress(StopIteration):  # it never awaits anything: one step is all of it
                self._authenticator.handle_zap_message(request).send(None)

    def callback(self, _domain: str, key: bytes) -> bool:
        """Say whether a client may enter; the authenticator calls it by this name."""
        self._read()
        admitted = self.admits(key.decode())
        if not admitted and (key.decode() in self._refused or len(self._refused) < REFUSED_AT_ONCE):
            self._refused[key.decode()] = self._refused.get(key.decode(), 0) + 1
        return admitted

    def admits(self, key: str | None) -> bool:
        """Whether the client with this key is on the list now."""
        return key in self._admitted

    def look(self) -> None:
        """Read the list again and report refusals, when that is due."""
        now = time.monotonic()
        if now >= self._read_due:
            self._read()
        if self._refused and now >= self._report_due:
            for key, times in self._refused.items():
                self._audit("refused", {"key": key, "times": times})
            self._refused.clear()
            self._report_due = now + REFUSED_S

    def close(self) -> None:
        """Stop answering."""
        self._authenticator.stop()

    def _read(self) -> None:
        self._read_due = time.monotonic() + REREAD_S
        clients, problems = read_clients(self._folder)
        self.problem = problems[0] if problems else None
        removed = self._admitted - clients.keys()
        self._admitted = frozenset(clients)
        for key in sorted(removed):
            self._audit("removed", {"key": key})
        if removed:
            self._on_removed()
