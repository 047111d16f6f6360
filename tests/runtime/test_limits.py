"""What a client can make the server take: sizes, depths, rates and waiting are bounded, on the live sockets."""

import ast
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

import sonoedge
from sonoedge.runtime.endpoints import connect
from sonoedge.runtime.protocol import (
    MAX_WIRE_BYTES,
    Error,
    ProtocolError,
    Request,
    StatusRequest,
    decode_request,
    encode,
)
from sonoedge.runtime.rate import RateLimit
from sonoedge.runtime.wire import REQUESTS_AT_ONCE, REQUESTS_PER_S, Wire

PACKAGE = Path(sonoedge.__file__).parent
PARTS = ("calibration", "device_profiles", "export", "runtime")


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A wire that answers every readable request with an error that says so."""
    made = Wire(
        "tcp://127.0.0.1:*",
        "tcp://127.0.0.1:*",
        on_request=lambda envelope, request: made.reply(envelope, Error("answered", request.id)),
        on_gone=lambda _: None,
        on_idle=lambda: None,
    )
    thread = threading.Thread(target=made.run)
    thread.start()
    yield made
    made.stop()
    thread.join()


@pytest.fixture
def dealer(wire: Wire) -> "Iterator[zmq.Socket[bytes]]":
    sock = connect(zmq.DEALER, wire.requests_endpoint)
    sock.set(zmq.RCVTIMEO, 10_000)
    yield sock
    sock.close()


def option(sock: "zmq.Socket[bytes]", name: int) -> int:
    value = sock.get(name)
    assert isinstance(value, int)
    return value


def test_the_live_sockets_of_the_server_have_their_limits(wire: Wire) -> None:
    for sock in (wire._router, wire._pub):
        assert 0 < option(sock, zmq.LINGER) <= 1000
        assert option(sock, zmq.MAXMSGSIZE) == MAX_WIRE_BYTES
        assert 0 < option(sock, zmq.SNDHWM) <= 1000
        assert 0 < option(sock, zmq.RCVHWM) <= 1000
        assert option(sock, zmq.HEARTBEAT_IVL) == 2000
        assert option(sock, zmq.HEARTBEAT_TIMEOUT) == 6000
        assert option(sock, zmq.HEARTBEAT_TTL) == 10_000
        assert option(sock, zmq.HANDSHAKE_IVL) == 5000
        assert option(sock, zmq.BACKLOG) >= 200
    assert option(wire._router, zmq.RCVHWM) * MAX_WIRE_BYTES <= 100 * 2**20  # what one client can make it hold


def test_the_live_socket_of_a_client_has_its_limits(dealer: "zmq.Socket[bytes]") -> None:
    assert option(dealer, zmq.LINGER) == 0
    assert option(dealer, zmq.MAXMSGSIZE) == MAX_WIRE_BYTES
    assert 0 < option(dealer, zmq.SNDTIMEO) <= 1000
    assert 0 < option(dealer, zmq.SNDHWM) <= 1000
    assert option(dealer, zmq.HEARTBEAT_IVL) == 2000


def test_a_message_over_the_wire_limit_ends_its_connection_only(wire: Wire, dealer: "zmq.Socket[bytes]") -> None:
    raw = connect(zmq.DEALER, wire.requests_endpoint)
    try:
        raw.send(b"x" * (MAX_WIRE_BYTES + 1))
        assert not raw.poll(500)  # what it sends next goes over a new connection
    finally:
        raw.close()
    dealer.send(encode(StatusRequest("r")))
    assert msgspec.msgpack.decode(dealer.recv())["message"] == "answered"


def test_too_many_requests_are_told_when_to_come_back_and_then_served(wire: Wire, dealer: "zmq.Socket[bytes]") -> None:
    for number in range(REQUESTS_AT_ONCE + 50):
        dealer.send(encode(StatusRequest(number)))
    replies = [msgspec.msgpack.decode(dealer.recv()) for _ in range(REQUESTS_AT_ONCE + 50)]
    refused = [reply for reply in replies if reply["message"] != "answered"]
    assert 1 <= len(refused) <= 50
    assert [reply["id"] for reply in replies] == list(range(REQUESTS_AT_ONCE + 50))
    for reply in refused:
        assert reply["message"] == f"more than {REQUESTS_PER_S} requests a second: retry in {reply['retry_ms']} ms"
    other = connect(zmq.DEALER, wire.requests_endpoint)
    try:
        other.send(encode(StatusRequest("mine")))  # another client has a bucket of its own
        assert other.poll(5000)
        assert msgspec.msgpack.decode(other.recv())["message"] == "answered"
    finally:
        other.close()
    time.sleep(refused[-1]["retry_ms"] / 1000 + 0.05)
    dealer.send(encode(StatusRequest("later")))
    assert msgspec.msgpack.decode(dealer.recv())["message"] == "answered"


def test_garbage_counts_against_the_rate_too(wire: Wire, dealer: "zmq.Socket[bytes]") -> None:
    for _ in range(REQUESTS_AT_ONCE + 50):
        dealer.send(b"garbage")
    replies = [msgspec.msgpack.decode(dealer.recv()) for _ in range(REQUESTS_AT_ONCE + 50)]
    assert all(reply["type"] == "error" for reply in replies)
    assert any(reply["retry_ms"] for reply in replies)


@given(
    per_s=st.floats(0.5, 1000),
    burst=st.integers(1, 100),
    waits=st.lists(st.floats(0, 0.5), max_size=200),
)
def test_no_client_ever_gets_more_than_its_rate(per_s: float, burst: int, waits: list[float]) -> None:
    limit, now, taken = RateLimit(per_s, burst), 0.0, 0
    for number, wait in enumerate(waits):
        now += wait
        retry_ms = limit.take("one", now)
        taken += retry_ms is None
        assert taken <= burst + per_s * now + 1e-6
        if retry_ms is not None:
            assert limit.take(f"new {number}", now) is None  # others have buckets of their own
            assert 1 <= retry_ms <= 1000 / per_s + 1


def test_waiting_as_long_as_told_is_enough_and_buckets_are_bounded() -> None:
    limit = RateLimit(10, 2, clients=5)
    assert [limit.take("a", 0.0) for _ in range(3)] == [None, None, 100]
    assert limit.take("a", 0.1) is None
    assert limit.take("a", 0.05) is not None  # a clock that goes back gives nothing away
    for number in range(100):
        limit.take(number, 1.0)
    assert len(limit._buckets) == 5


DEEP = 60_000


@pytest.mark.parametrize(
    "payload",
    [
        b"\x91" * DEEP + b"\x90",
        b"\x81\xa1a" * (DEEP // 3) + b"\x80",
        b"\x82\xa4type\xa6status\xa1x" + b"\x91" * DEEP + b"\x90",
        b"\x83\xa4type\xa3ask\xa2id\xa1i\xa8question" + b"\x91" * DEEP + b"\x90",
        b"\x81\xa4type" + b"\x91" * DEEP + b"\x90",
        b"\xdd\xff\xff\xff\xff",  # an array said to have 2^32 elements
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
)
def test_depth_and_length_said_in_a_header_are_refused_cheaply(
    wire: Wire, dealer: "zmq.Socket[bytes]", payload: bytes
) -> None:
    began = time.perf_counter()
    with pytest.raises(ProtocolError):
        decode_request(payload)
    assert time.perf_counter() - began < 0.1
    dealer.send(payload)
    assert msgspec.msgpack.decode(dealer.recv())["type"] == "error"
    dealer.send(encode(StatusRequest("r")))
    assert msgspec.msgpack.decode(dealer.recv())["message"] == "answered"


def _unbounded(kind: msgspec.inspect.Type, path: str) -> Iterator[str]:
    """Yield where a client may put as much as fits."""
    match kind:
        case msgspec.inspect.StrType() | msgspec.inspect.BytesType():
            if kind.max_length is None:
                yield path
        case (
            msgspec.inspect.ListType(item_type=item)
            | msgspec.inspect.VarTupleType(item_type=item)
            | msgspec.inspect.SetType(item_type=item)
        ):
            if kind.max_length is None:
                yield path
            yield from _unbounded(item, f"{path}[]")
        case msgspec.inspect.DictType():
            yield path
        case msgspec.inspect.UnionType():
            for one in kind.types:
                yield from _unbounded(one, path)
        case msgspec.inspect.StructType():
            if not kind.forbid_unknown_fields:
                yield f"{path}.*"
            for field in kind.fields:
                yield from _unbounded(field.type, f"{path}.{field.name}")
        case msgspec.inspect.AnyType():
            yield path


def test_every_field_of_a_request_is_bounded() -> None:
    open_ended = [
        place
        for request in get_args(Request)
        for place in _unbounded(msgspec.inspect.type_info(request), request.__name__)
    ]
    assert open_ended == []


def test_nothing_anywhere_unpickles() -> None:
    """What pickle loads, runs; so do marshal, shelve and a NumPy file that may hold objects."""
    folders = [PACKAGE, *((PACKAGE / part).resolve() for part in PARTS)]
    paths = sorted({path for folder in folders for path in folder.rglob("*.py")})
    assert len(paths) > 100
    assert [where for path in paths for where in _unsafe(path)] == []


def _unsafe(path: Path) -> list[str]:
    banned = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        match node:
            case ast.Import(names=names) if {name.name.partition(".")[0] for name in names} & banned:
                found.append(where)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in banned:
                found.append(where)
            case ast.Attribute(attr="recv_pyobj" | "send_pyobj"):
                found.append(where)
            case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                found.append(where)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")) if not any(
                keyword.arg == "weights_only" and getattr(keyword.value, "value", None) is True
                for keyword in node.keywords
            ):
                found.append(where)
    return found


UNSAFE = (
    "import pickle",
    "from pickle import loads",
    "sock.recv_pyobj()",
    "np.load(f, allow_pickle=True)",
    "torch.load(f)",
)


@pytest.mark.parametrize("line", UNSAFE)
def test_the_search_for_pickle_finds_it(tmp_path: Path, line: str) -> None:
    (tmp_path / "module.py").write_text(line)
    assert _unsafe(tmp_path / "module.py") == ["module.py:1"]
