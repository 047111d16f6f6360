"""CURVE over real loopback sockets: only a listed key gets answers and hints, and only first-hand."""

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.curve import secure_client, secure_server
from sonoedge.runtime.endpoints import connect
from sonoedge.runtime.key_files import ClientKeys, ServerKeys, allow_client, make_pair, remove_client
from sonoedge.runtime.protocol import Ask, Error, Hint, Status, StatusRequest, Telemetry, encode
from sonoedge.runtime.wire import Envelope, Wire

SILENCE_S = 0.7  # an answer over loopback takes milliseconds
GREETING_BYTES = 64  # ZMTP 3.1


class Echo:
    """A wire whose every status request is answered at once, and which publishes telemetry all the time."""

    def __init__(self, security: ServerKeys | None, bind: str = "tcp://127.0.0.1:*") -> None:
        self.requests: list[Any] = []
        self.keys: list[str | None] = []
        self.audited: list[tuple[str, dict[str, Any]]] = []
        self.wire = Wire(
            bind,
            bind,
            on_request=self._request,
            on_gone=lambda _: None,
            on_idle=lambda: self.wire.publish(TELEMETRY),
            security=security,
            audit=lambda kind, fields: self.audited.append((kind, dict(fields))),
        )
        self._thread = threading.Thread(target=self.wire.run)
        self._thread.start()

    def _request(self, envelope: Envelope, request: Any) -> None:
        self.requests.append(request)
        self.keys.append(envelope.key)
        self.wire.reply(envelope, Error("answered", request.id))

    def stop(self) -> None:
        self.wire.stop()
        self._thread.join()


TELEMETRY = msgspec.convert(
    {
        "type": "telemetry",
        **{field.name: 0 for field in msgspec.structs.fields(Telemetry) if field.required and field.name != "v"},
    },
    Telemetry,
    strict=False,
)


class Cast(msgspec.Struct, frozen=True):
    """Everybody's keys: `listed` and `other` are on the list, `stranger` is not."""

    server: ServerKeys
    listed: ClientKeys
    other: ClientKeys
    stranger: ClientKeys


@pytest.fixture
def cast(tmp_path: Path) -> Cast:
    pairs = {name: make_pair(tmp_path / "keys" / name) for name in ("server", "listed", "other", "stranger")}
    for name in ("listed", "other"):
        allow_client(tmp_path / "allow", str(tmp_path / "keys" / f"{name}.key"))
    listed, other, stranger = (ClientKeys(pairs[name], pairs["server"].public) for name in list(pairs)[1:])
    return Cast(ServerKeys(pairs["server"], tmp_path / "allow"), listed, other, stranger)


@pytest.fixture
def echo(cast: Cast) -> Iterator[Echo]:
    running = Echo(cast.server)
    yield running
    running.stop()


@contextlib.contextmanager
def dialled(kind: int, endpoint: str, keys: ClientKeys | None) -> "Iterator[zmq.Socket[bytes]]":
    sock = connect(kind, endpoint, keys)
    try:
        yield sock
    finally:
        sock.close()


def answered(sock: "zmq.Socket[bytes]", request_id: str = "r", wait_s: float = SILENCE_S) -> bool:
    with contextlib.suppress(zmq.Again):  # libzmq gives a refused connection up
        sock.send(encode(StatusRequest(request_id)))
    return bool(sock.poll(round(wait_s * 1000))) and msgspec.msgpack.decode(sock.recv())["id"] == request_id


def test_a_listed_key_works_and_the_server_knows_whose_it_is(echo: Echo, cast: Cast) -> None:
    with dialled(zmq.DEALER, echo.wire.requests_endpoint, cast.listed) as sock:
        assert answered(sock, wait_s=5)
    assert echo.keys == [cast.listed.pair.public]
    assert next(listen(echo.wire.hints_endpoint, timeout_s=5, keys=cast.listed)) == TELEMETRY


@pytest.mark.parametrize("who", ["no key", "stranger", "wrong server key", "secret of another"])
def test_nobody_else_gets_a_word(echo: Echo, cast: Cast, who: str) -> None:
    keys = {
        "no key": None,
        "stranger": cast.stranger,
        "wrong server key": ClientKeys(cast.listed.pair, cast.stranger.pair.public),
        "secret of another": ClientKeys(
            msgspec.structs.replace(cast.listed.pair, secret=cast.stranger.pair.secret), cast.server.pair.public
        ),
    }[who]
    with (
        dialled(zmq.DEALER, echo.wire.requests_endpoint, keys) as sock,
        dialled(zmq.SUB, echo.wire.hints_endpoint, keys) as sub,
    ):
        sub.subscribe(b"")
        assert not answered(sock)
        assert not sub.poll(100)
    assert echo.requests == []
    with dialled(zmq.DEALER, echo.wire.requests_endpoint, cast.listed) as sock:
        assert answered(sock, wait_s=5)  # it still serves those who may


def test_refused_keys_are_told_to_the_audit_log_once_in_a_while(echo: Echo, cast: Cast) -> None:
    with dialled(zmq.DEALER, echo.wire.requests_endpoint, cast.stranger):
        until = time.monotonic() + 5
        while not echo.audited and time.monotonic() < until:
            time.sleep(0.01)
    kind, fields = echo.audited[0]
    assert (kind, fields["key"]) == ("refused", cast.stranger.pair.public)
    assert fields["times"] >= 1
    assert len(echo.audited) <= 2


def test_a_key_taken_off_the_list_stops_working_while_connected(echo: Echo, cast: Cast) -> None:
    requests, hints = echo.wire.requests_endpoint, echo.wire.hints_endpoint
    with (
        dialled(zmq.DEALER, requests, cast.listed) as gone,
        dialled(zmq.DEALER, requests, cast.other) as stays,
        dialled(zmq.SUB, hints, cast.listed) as gone_sub,
        dialled(zmq.SUB, hints, cast.other) as stays_sub,
    ):
        for sub in (gone_sub, stays_sub):
            sub.subscribe(b"")
            assert sub.poll(5000)
        assert answered(gone, wait_s=5)
        assert answered(stays, wait_s=5)
        remove_client(cast.server.allow, "listed")
        until = time.monotonic() + 5
        while ("removed", {"key": cast.listed.pair.public}) not in echo.audited and time.monotonic() < until:
            time.sleep(0.01)
        heard = len(echo.requests)
        assert not answered(gone)
        assert len(echo.requests) == heard
        while gone_sub.poll(0):
            gone_sub.recv()
        assert not gone_sub.poll(800)
        while stays_sub.poll(0):
            stays_sub.recv()
        assert stays_sub.poll(5000)  # turned out with the other, and back by itself
        assert answered(stays, "again", wait_s=5)
        allow_client(cast.server.allow, cast.listed.pair.public, "listed-again")
        with dialled(zmq.DEALER, requests, cast.listed) as back:
            assert answered(back, wait_s=5)


def test_an_answer_that_is_ready_after_the_removal_is_not_sent(cast: Cast) -> None:
    echo = Echo(cast.server)
    kept: list[Envelope] = []
    echo.wire._on_request = lambda envelope, request: kept.append(envelope)
    gone: list[Envelope] = []
    echo.wire._on_gone = gone.append
    try:
        with dialled(zmq.DEALER, echo.wire.requests_endpoint, cast.listed) as sock:
            assert not answered(sock)
            remove_client(cast.server.allow, cast.listed.pair.public)
            time.sleep(1.3)  # the list is read every second
            echo.wire.call(lambda: echo.wire.reply(kept[0], Error("late", "r")))
            assert not sock.poll(500)
        assert gone == kept
    finally:
        echo.stop()


def test_a_list_that_cannot_be_read_admits_nobody(echo: Echo, cast: Cast) -> None:
    shutil.rmtree(cast.server.allow)
    with dialled(zmq.DEALER, echo.wire.requests_endpoint, cast.listed) as sock:
        assert not answered(sock)


def test_a_damaged_entry_admits_nobody_and_locks_nobody_else_out(echo: Echo, cast: Cast) -> None:
    (cast.server.allow / "other.key").write_text('curve\n    public-key = "short"\n')
    (cast.server.allow / "binary.key").write_bytes(b"\xff\x00\xfe")
    with (
        dialled(zmq.DEALER, echo.wire.requests_endpoint, cast.listed) as sock,
        dialled(zmq.DEALER, echo.wire.requests_endpoint, cast.other) as out,
    ):
        assert answered(sock, wait_s=5)
        assert not answered(out)


def test_without_a_door_a_secured_socket_admits_nobody(cast: Cast) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    try:
        secure_server(server, cast.server)
        port = server.bind_to_random_port("tcp://127.0.0.1")
        secure_client(client, cast.listed)
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"hello")
        assert not server.poll(600)
    finally:
        server.close(0)
        client.close(0)
        context.term()


def test_an_ipc_endpoint_can_be_secured_too(cast: Cast, tmp_path: Path) -> None:
    wire = Wire(
        f"ipc://{tmp_path}/ask",
        f"ipc://{tmp_path}/hints",
        on_request=lambda envelope, request: wire.reply(envelope, Error("answered", request.id)),
        on_gone=lambda _: None,
        on_idle=lambda: None,
        security=cast.server,
    )
    thread = threading.Thread(target=wire.run)
    thread.start()
    try:
        with (
            dialled(zmq.DEALER, wire.requests_endpoint, cast.listed) as sock,
            dialled(zmq.DEALER, wire.requests_endpoint, None) as bare,
        ):
            assert answered(sock, wait_s=5)
            assert not answered(bare)
    finally:
        wire.stop()
        thread.join()


def test_an_endpoint_open_to_others_is_served_with_keys_and_only_with_them(cast: Cast) -> None:
    with pytest.raises(SonoEdgeError, match="can be reached from other machines: give --server-key and --allow"):
        Echo(None, "tcp://0.0.0.0:*")
    echo = Echo(cast.server, "tcp://0.0.0.0:*")
    try:
        endpoint = echo.wire.requests_endpoint.replace("0.0.0.0", "127.0.0.1")
        with dialled(zmq.DEALER, endpoint, cast.listed) as sock, dialled(zmq.DEALER, endpoint, None) as bare:
            assert answered(sock, wait_s=5)
            assert not answered(bare)
    finally:
        echo.stop()


def test_a_whole_server_answers_and_hints_only_with_a_key(
    cast: Cast, make_model: Callable[..., Any], make_source: Callable[..., Any], start_server: Callable[..., Any]
) -> None:
    server = start_server(make_source(), security=cast.server)
    with Client(server.requests_endpoint, timeout_s=10, keys=cast.listed) as client:
        assert isinstance(client.status(), Status)
        assert client.answer("Is a lesion visible?").answer
    assert any(isinstance(message, Hint) for message in listen(server.hints_endpoint, timeout_s=10, keys=cast.other))
    for keys in (None, cast.stranger):
        with Client(server.requests_endpoint, timeout_s=SILENCE_S, keys=keys) as client:
            for _ in range(2):  # the second meets a connection that was given up
                with pytest.raises(SonoEdgeError, match=r"silent for 0\.7 s: .* keys"):
                    client.status()


class Tap:
    """A TCP relay in front of an endpoint that records what the client sends, and may add to it."""

    def __init__(self, endpoint: str) -> None:
        self._target = endpoint.removeprefix("tcp://").rsplit(":", 1)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent = bytearray()
        self._sockets = [self._listener]
        self.upstream: socket.socket | None = None
        self.hung_up = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            self.upstream = socket.create_connection((self._target[0], int(self._target[1])))
            self._sockets += [client, self.upstream]
            threading.Thread(target=self._pump, args=(client, self.upstream, self.sent), daemon=True).start()
            threading.Thread(target=self._pump, args=(self.upstream, client, bytearray()), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                kept += data
                target.sendall(data)
        if source is self.upstream:
            self.hung_up.set()

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


@pytest.fixture
def tap(echo: Echo) -> Iterator[Callable[[], Tap]]:
    taps: list[Tap] = []

    def open_tap() -> Tap:
        taps.append(Tap(echo.wire.requests_endpoint))
        return taps[-1]

    yield open_tap
    for one in taps:
        one.close()


def zmtp_frames(stream: bytes) -> list[bytes]:
    """Split what follows the greeting: flags (bit 1: a length of 8 bytes), length, body."""
    frames, rest = [], stream[GREETING_BYTES:]
    while rest:
        long = bool(rest[0] & 2)
        size = (9 + int.from_bytes(rest[1:9], "big")) if long else (2 + rest[1])
        frames.append(rest[:size])
        rest = rest[size:]
    return frames


def record(echo: Echo, tap: Callable[[], Tap], keys: ClientKeys) -> bytes:
    """What an admitted client sent, from its greeting to a question that was answered."""
    one = tap()
    with dialled(zmq.DEALER, one.endpoint, keys) as sock:
        assert answered(sock, "recorded", wait_s=5)
        recorded = bytes(one.sent)
    assert [len(frame) > 30 for frame in zmtp_frames(recorded)].count(True) >= 3  # HELLO, INITIATE, MESSAGE
    echo.requests.clear()
    return recorded


def hear(sock: socket.socket, seconds: float) -> bytes:
    """Everything the server says until it hangs up or `seconds` have passed."""
    heard, until = b"", time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            data = sock.recv(65536)
        except (TimeoutError, ConnectionResetError):
            break
        if not data:
            break
        heard += data
    return heard


@pytest.mark.parametrize("step_by_step", [False, True], ids=["at once", "step by step"])
def test_a_replayed_handshake_and_question_are_not_answered(
    echo: Echo, cast: Cast, tap: Callable[[], Tap], step_by_step: bool
) -> None:
    recorded = record(echo, tap, cast.listed)
    host, port = echo.wire.requests_endpoint.removeprefix("tcp://").rsplit(":", 1)
    parts = [recorded[:GREETING_BYTES], *zmtp_frames(recorded)] if step_by_step else [recorded]
    with socket.create_connection((host, int(port))) as replay:
        heard = b""
        for part in parts:
            try:
                replay.sendall(part)
            except OSError:  # it hung up, which is right
                break
            heard += hear(replay, 0.15)
        heard += hear(replay, SILENCE_S)
    assert b"WELCOME" in heard or not step_by_step  # it spoke CURVE to it
    assert b"READY" not in heard  # and went no further
    assert b"MESSAGE" not in heard
    assert echo.requests == []


@pytest.mark.parametrize("who", ["other", "listed"])
def test_a_recorded_question_put_into_another_connection_is_not_answered(
    echo: Echo, cast: Cast, tap: Callable[[], Tap], who: str
) -> None:
    """Neither in the connection of another listed key nor in a second one of the same key."""
    message = zmtp_frames(record(echo, tap, cast.listed))[-1]
    assert b"MESSAGE" in message
    second = tap()
    with dialled(zmq.DEALER, second.endpoint, getattr(cast, who)) as sock:
        assert answered(sock, "own", wait_s=5)
        assert second.upstream is not None
        second.upstream.sendall(message)
        assert second.hung_up.wait(5)  # the server cuts the connection
        assert not sock.poll(300)
    assert [request.id for request in echo.requests] == ["own"]


def test_a_question_sent_twice_in_its_own_connection_is_answered_once(
    echo: Echo, cast: Cast, tap: Callable[[], Tap]
) -> None:
    one = tap()
    with dialled(zmq.DEALER, one.endpoint, cast.listed) as sock:
        assert answered(sock, "once", wait_s=5)
        assert one.upstream is not None
        one.upstream.sendall(zmtp_frames(bytes(one.sent))[-1])
        assert one.hung_up.wait(5)
        assert not sock.poll(300)
    assert [request.id for request in echo.requests] == ["once"]


def test_a_peer_that_never_says_who_it_is_is_cut_off(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    assert echo.wire._router.get(zmq.HANDSHAKE_IVL) == 5000
    host, port = echo.wire.requests_endpoint.removeprefix("tcp://").rsplit(":", 1)
    with socket.create_connection((host, int(port))) as mute:
        mute.settimeout(8)
        began, heard = time.monotonic(), b""
        while data := mute.recv(4096):
            heard += data
        assert time.monotonic() - began < 7
    assert len(heard) <= GREETING_BYTES


def test_asking_is_typed_like_everything_else(echo: Echo, cast: Cast) -> None:
    with dialled(zmq.DEALER, echo.wire.requests_endpoint, cast.listed) as sock:
        sock.send(encode(Ask("q", "What?")))
        assert sock.poll(5000)
    assert echo.requests[0].question == "What?"
