"""A running server over real loopback sockets: answers, hints, refusals, and clients that misbehave."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from sonoedge.bundle import HintCalibration
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.endpoints import check_endpoint
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.model import Model
from sonoedge.runtime.protocol import Answer, Ask, Cancel, Error, Hint, State, StatusRequest, Telemetry, Token, encode
from sonoedge.runtime.server import Server

StartServer = Callable[..., Server]
MakeSource = Callable[..., Any]
MakeModel = Callable[..., Model]
TIMEOUT_MS = 30_000


@pytest.fixture
def dial() -> Iterator[Callable[..., "zmq.Socket[bytes]"]]:
    """Connect a raw socket: `dial(zmq.REQ, endpoint)`."""
    sockets: list[zmq.Socket[bytes]] = []

    def connect(kind: int, endpoint: str) -> "zmq.Socket[bytes]":
        sock: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        sock.set(zmq.LINGER, 0)
        sock.set(zmq.RCVTIMEO, TIMEOUT_MS)
        sock.connect(endpoint)
        sockets.append(sock)
        return sock

    yield connect
    for sock in sockets:
        sock.close()


def packed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def replies(sock: "zmq.Socket[bytes]", count: int = 1) -> list[dict[str, Any]]:
    return [msgspec.msgpack.decode(sock.recv()) for _ in range(count)]


def until_answer(sock: "zmq.Socket[bytes]") -> list[dict[str, Any]]:
    received = replies(sock)
    while received[-1]["type"] == "token":
        received += replies(sock)
    return received


def test_streams_an_answer_about_the_newest_frame(start_server: StartServer, make_source: MakeSource) -> None:
    source = make_source()
    server = start_server(source)
    source.brightness = 255
    seen = server.telemetry().hinted
    while server.telemetry().hinted < seen + 3:
        time.sleep(0.01)
    with Client(server.requests_endpoint, timeout_s=30) as client:
        *tokens, answer = client.ask("这是什么?")
        assert isinstance(answer, Answer)
        assert answer.answer == "亮度 100 %: 这是什么?"
        assert "".join(token.text for token in tokens if isinstance(token, Token)) == answer.answer
        assert len(tokens) > 10
        assert answer.frame >= seen
        assert answer.age_ms > 0
        assert answer.ms > 0
        assert (answer.finish, answer.model) == ("stop", "0123456789abcdef")
        assert answer.intended_use == "Tests only, never a diagnosis."
        assert client.answer("Is a lesion visible?").answer == "no"
        assert client.answer("是否可见病灶？", language="zh").answer == "无"


def test_publishes_hints_state_and_telemetry(start_server: StartServer, make_source: MakeSource) -> None:
    server = start_server(make_source())
    hints: list[Hint] = []
    others: list[State | Telemetry] = []
    for message in listen(server.hints_endpoint, timeout_s=30):
        (hints if isinstance(message, Hint) else others).append(message)  # type: ignore[arg-type]
        if len(hints) >= 40 and {type(other) for other in others} == {State, Telemetry}:
            break
    by_frame: dict[int, list[Hint]] = {}
    for hint in hints:
        by_frame.setdefault(hint.frame, []).append(hint)
    whole = list(by_frame.values())[1:-1]
    assert all([hint.hint for hint in group] == ["region", "quality", "finding", "kind", "side"] for group in whole)
    region = whole[0][0]
    assert (region.answer, region.abstain, region.reason, region.source) == ("breast", False, None, "test")
    assert region.text is not None
    assert region.text.zh == "乳腺"
    assert region.age_ms > 0
    telemetry = next(other for other in others if isinstance(other, Telemetry))
    assert telemetry.frames >= telemetry.hinted + telemetry.dropped > 0
    assert telemetry.p50_ms is not None


def test_an_abstention_is_published(start_server: StartServer, make_source: MakeSource, make_model: MakeModel) -> None:
    model = make_model(calibration={"region": HintCalibration(temperature=50, abstain_below=0.9)})
    server = start_server(make_source(), model)
    hint = next(m for m in listen(server.hints_endpoint, timeout_s=30) if isinstance(m, Hint) and m.hint == "region")
    assert (hint.abstain, hint.answer, hint.text, hint.reason) == (True, None, None, "low confidence")
    assert len(hint.candidates) == 7


def test_single_part_messages_can_be_conflated(
    start_server: StartServer, make_source: MakeSource, dial: Callable[..., Any]
) -> None:
    server = start_server(make_source())
    sock: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.SUB)
    sock.set(zmq.CONFLATE, 1)
    sock.set(zmq.LINGER, 0)
    sock.set(zmq.RCVTIMEO, TIMEOUT_MS)
    sock.subscribe(b"")
    sock.connect(server.hints_endpoint)
    try:
        assert msgspec.msgpack.decode(sock.recv())["v"] == 1
    finally:
        sock.close()


def test_a_req_client_gets_the_answer_alone(
    start_server: StartServer, make_source: MakeSource, dial: Callable[..., Any]
) -> None:
    server = start_server(make_source())
    sock = dial(zmq.REQ, server.requests_endpoint)
    for number in range(3):
        sock.send(packed(type="ask", v=1, id=number, question="Hello?"))
        (reply,) = replies(sock)
        assert (reply["type"], reply["id"], reply["answer"]) == ("answer", number, "亮度 0 %: Hello?")
    sock.send(b"garbage")
    assert replies(sock)[0]["type"] == "error"
    sock.send(packed(type="status", v=1, id="s"))
    (status,) = replies(sock)
    assert status["source"]["state"] == "live"
    assert status["telemetry"]["questions"] == 3


def test_a_dealer_with_delimiter_may_stream(
    start_server: StartServer, make_source: MakeSource, dial: Callable[..., Any]
) -> None:
    server = start_server(make_source())
    sock = dial(zmq.DEALER, server.requests_endpoint)
    sock.send_multipart([b"", packed(type="ask", v=1, id="a", question="?", stream=True)])
    first = sock.recv_multipart()
    assert first[0] == b""
    assert msgspec.msgpack.decode(first[1])["type"] == "token"


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe garbage",
        packed(type="ask", v=99, id="x", question="?"),
        packed(type="dance", v=1),
        packed(type="ask", v=1, id="x", question="q" * 200_000),
        packed(type="ask", v=1, id="x", question="   "),
        packed(type="cancel", v=1, id="never"),
    ],
    ids=["empty", "garbage", "version", "unknown", "oversized", "blank", "cancel"],
)
def test_bad_requests_get_an_error_and_hurt_nobody(
    start_server: StartServer, make_source: MakeSource, dial: Callable[..., Any], payload: bytes
) -> None:
    server = start_server(make_source())
    bad = dial(zmq.DEALER, server.requests_endpoint)
    with Client(server.requests_endpoint, timeout_s=30) as good:
        asking = good.ask("Still there?")
        next(asking)
        bad.send(payload)
        (reply,) = replies(bad)
        assert reply["type"] == "error"
        assert reply["message"]
        bad.send_multipart([b"a", b"b", b"c"])
        assert "3 parts" in replies(bad)[0]["message"]
        *_, answer = asking
        assert isinstance(answer, Answer)
        assert answer.answer == "亮度 0 %: Still there?"


def test_raw_tcp_noise_and_giants_are_cut_off_alone(
    start_server: StartServer, make_source: MakeSource, dial: Callable[..., Any]
) -> None:
    server = start_server(make_source())
    host, port = server.requests_endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        giant = dial(zmq.DEALER, server.requests_endpoint)
        giant.send(bytes(4 * 2**20))
        with Client(server.requests_endpoint, timeout_s=30) as client:
            assert client.answer("Fine?").finish == "stop"


def test_a_question_longer_than_the_context_names_both_lengths(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel
) -> None:
    server = start_server(make_source(), make_model(context=600))
    with Client(server.requests_endpoint, timeout_s=30) as client:
        with pytest.raises(SonoEdgeError, match=r"\d+ tokens long and the context holds 600"):
            client.answer("why " * 300)
        assert client.answer("Fine?").finish == "stop"


def test_before_the_first_frame_there_is_no_answer(start_server: StartServer, make_source: MakeSource) -> None:
    source = make_source(silent=True)
    server = start_server(source, wait_for_frame=False)
    with Client(server.requests_endpoint, timeout_s=30) as client:
        with pytest.raises(SonoEdgeError, match="no frame yet: the source shade is waiting"):
            client.answer("What?")
        assert client.status().source.state == "waiting"
        source.silent = False
        while client.status().telemetry.frames == 0:
            time.sleep(0.01)
        assert client.answer("What?").finish == "stop"


def test_the_state_is_what_the_source_says_of_itself(start_server: StartServer, make_source: MakeSource) -> None:
    source = make_source(fps=100)
    server = start_server(source)
    source.silent = True
    source.state, source.detail = "stalled", "connected but no frames for 2.1 s"
    states = (m for m in listen(server.hints_endpoint, timeout_s=30) if isinstance(m, State))
    assert any((state.state, state.detail) == ("stalled", "connected but no frames for 2.1 s") for state in states)


def test_hints_go_on_during_a_long_answer(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel
) -> None:
    server = start_server(make_source(), make_model(step_s=0.002), answer_slice_ms=20)
    question = "Tell me a long story. " * 4
    with Client(server.requests_endpoint, timeout_s=30) as client:
        before = server.telemetry().hinted
        answer = client.answer(question)
        during = server.telemetry().hinted - before
    assert answer.answer == f"亮度 0 %: {question.strip()}"
    assert answer.ms > 100
    assert during >= 3
    assert server.telemetry().dropped > 0


def test_cancel_deadline_and_max_tokens(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel, dial: Callable[..., Any]
) -> None:
    server = start_server(make_source(), make_model(step_s=0.005))
    sock = dial(zmq.DEALER, server.requests_endpoint)
    long = "A long question to be told again. " * 20
    sock.send(encode(Ask("a", long)))
    assert replies(sock)[0]["type"] == "token"
    sock.send(encode(Ask("a", "again?")))
    received = until_answer(sock)
    assert (received[-1]["type"], received[-1]["id"]) == ("error", "a")
    assert "another id" in received[-1]["message"]
    sock.send(encode(Cancel("a")))
    assert until_answer(sock)[-1]["finish"] == "cancelled"
    sock.send(encode(Ask("b", long, deadline_ms=150)))
    late = until_answer(sock)[-1]
    assert late["finish"] == "deadline"
    assert long.startswith(late["answer"].partition(": ")[2])
    sock.send(encode(Ask("c", long, max_tokens=3)))
    assert until_answer(sock)[-1]["finish"] == "length"


def test_a_full_queue_says_when_to_come_back(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel, dial: Callable[..., Any]
) -> None:
    server = start_server(make_source(), make_model(step_s=0.005))
    sock = dial(zmq.DEALER, server.requests_endpoint)
    for number in range(12):
        sock.send(encode(Ask(number, "A question? " * 10, stream=False)))
    refused = [reply for reply in replies(sock, 4) if reply["type"] == "error"]
    assert len(refused) == 4
    assert all(
        reply["retry_ms"] > 0 and f"busy, retry in {reply['retry_ms']} ms" == reply["message"] for reply in refused
    )
    for number in range(8):
        sock.send(encode(Cancel(number)))
    assert sorted(reply["id"] for reply in replies(sock, 8)) == list(range(8))


def test_a_client_that_leaves_frees_its_place(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel, dial: Callable[..., Any]
) -> None:
    server = start_server(make_source(), make_model(step_s=0.005))
    for _ in range(3):
        sock = dial(zmq.DEALER, server.requests_endpoint)
        sock.send(encode(Ask("a", "A very long question. " * 40)))
        replies(sock)
        sock.close()
    with Client(server.requests_endpoint, timeout_s=30) as client:
        until = time.monotonic() + 30
        while client.status().queued and time.monotonic() < until:
            time.sleep(0.02)
        assert client.status().queued == 0


def test_leaving_the_iteration_cancels_the_question(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel
) -> None:
    server = start_server(make_source(), make_model(step_s=0.005))
    with Client(server.requests_endpoint, timeout_s=30) as client:
        asking = client.ask("A very long question. " * 40)
        next(asking)
        asking.close()  # type: ignore[attr-defined]
        assert client.answer("Short?").answer == "亮度 0 %: Short?"


def test_frames_that_cannot_be_looked_at_are_reported(start_server: StartServer, make_source: MakeSource) -> None:
    source = make_source()
    source.size = (2, 800)
    server = start_server(source, wait_for_frame=False)
    states = (m for m in listen(server.hints_endpoint, timeout_s=30) if isinstance(m, State))
    assert any(state.detail is not None and "200 times" in state.detail for state in states)
    source.size = (60, 80)
    assert isinstance(next(m for m in listen(server.hints_endpoint, timeout_s=30) if isinstance(m, Hint)), Hint)


def test_once_ends_when_everything_was_said(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel
) -> None:
    server = start_server(make_source(fps=200, frames=20), make_model(step_s=0.01), wait_for_frame=False)
    assert server.wait(30)
    counts = server.telemetry()
    assert counts.frames == counts.hinted + counts.dropped == 20
    assert counts.dropped > 0
    assert counts.hints == 5 * counts.hinted


def test_a_source_that_breaks_ends_the_server(start_server: StartServer, make_source: MakeSource) -> None:
    class Broken(make_source):  # type: ignore[misc, valid-type]
        def __iter__(self) -> Iterator[Frame]:
            yield next(iter(make_source()))
            raise SonoEdgeError("the source broke: mend it")

    server = start_server(Broken())
    with pytest.raises(SonoEdgeError, match="mend it"):
        server.wait(30)


def test_a_defect_on_the_io_thread_ends_the_server(
    start_server: StartServer, make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start_server(make_source())
    monkeypatch.setattr(server._questions, "put", lambda question: 1 / 0)
    with Client(server.requests_endpoint, timeout_s=0.5) as client, pytest.raises(SonoEdgeError, match="silent"):
        client.answer("Fine?")
    with pytest.raises(ZeroDivisionError):
        server.wait(30)


def test_a_second_server_on_the_same_endpoint_is_refused(
    start_server: StartServer, make_source: MakeSource, make_model: MakeModel, tmp_path: Path
) -> None:
    server = start_server(make_source())
    for bind, hints in (
        (server.requests_endpoint, "tcp://127.0.0.1:*"),
        ("tcp://127.0.0.1:*", server.hints_endpoint),
    ):
        taken = bind if bind != "tcp://127.0.0.1:*" else hints
        with pytest.raises(SonoEdgeError, match=f"{taken} is in use"):
            Server(make_model(), make_source(), bind=bind, hints_bind=hints)
    with Client(server.requests_endpoint, timeout_s=30) as client:
        assert client.answer("Fine?").finish == "stop"


def test_ipc_endpoints_work_and_are_not_stolen(make_source: MakeSource, make_model: MakeModel, tmp_path: Path) -> None:
    bind, hints = f"ipc://{tmp_path}/ask", f"ipc://{tmp_path}/hints"
    for _ in range(2):  # the second finds the first one's socket files
        server = Server(make_model(), make_source(), bind=bind, hints_bind=hints)
        server.start()
        try:
            with pytest.raises(SonoEdgeError, match=f"{bind} is in use"):
                Server(make_model(), make_source(), bind=bind, hints_bind="tcp://127.0.0.1:*")
            with Client(bind) as client:
                assert client.status().model == "0123456789abcdef"
        finally:
            server.stop()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SonoEdgeError, match="is a file"):
        check_endpoint(f"ipc://{tmp_path}/file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://*:5555", "tcp://0.0.0.0:5555", "tcp://192.168.1.2:*", "tcp://eth0:5555", "tcp://[::]:5555", "tcp://host:1"],
)
def test_endpoints_open_to_others_are_refused(endpoint: str) -> None:
    with pytest.raises(SonoEdgeError, match="CURVE"):
        check_endpoint(endpoint)


@pytest.mark.parametrize("endpoint", ["5555", "tcp://127.0.0.1", "udp://127.0.0.1:5", "tcp://127.0.0.1:port", ""])
def test_what_is_no_endpoint_is_refused(endpoint: str) -> None:
    with pytest.raises(SonoEdgeError, match="is no endpoint"):
        check_endpoint(endpoint)


@pytest.mark.parametrize(
    "endpoint", ["tcp://127.0.0.1:5555", "tcp://127.1.2.3:*", "tcp://localhost:1", "tcp://[::1]:5"]
)
def test_loopback_endpoints_are_allowed(endpoint: str) -> None:
    check_endpoint(endpoint)


def test_nobody_there_is_told_after_the_timeout() -> None:
    with Client("tcp://127.0.0.1:1", timeout_s=0.2) as client, pytest.raises(SonoEdgeError, match=r"silent for 0\.2 s"):
        client.answer("Anyone?")
    with pytest.raises(SonoEdgeError, match=r"silent for 0\.2 s"):
        next(listen("tcp://127.0.0.1:1", timeout_s=0.2))
    with pytest.raises(SonoEdgeError, match="is no endpoint"):
        Client("nonsense")


def test_stopping_tells_those_who_wait(
    make_source: MakeSource, make_model: MakeModel, dial: Callable[..., Any]
) -> None:
    server = Server(make_model(step_s=0.005), make_source(), bind="tcp://127.0.0.1:*", hints_bind="tcp://127.0.0.1:*")
    server.start()
    sock = dial(zmq.DEALER, server.requests_endpoint)
    sock.send(encode(StatusRequest()))
    while replies(sock)[0]["telemetry"]["frames"] == 0:
        sock.send(encode(StatusRequest()))
    for number in range(3):
        sock.send(encode(Ask(number, "A long question, answered at length. " * 20, stream=False)))
    time.sleep(0.1)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 5
    assert [reply["message"].split(":")[0] for reply in replies(sock, 3)] == ["the server is stopping"] * 3
    assert not [thread for thread in threading.enumerate() if thread.name in ("wire", "worker", "capture", "pictures")]


def test_errors_name_the_question(start_server: StartServer, make_source: MakeSource, dial: Callable[..., Any]) -> None:
    server = start_server(make_source())
    sock = dial(zmq.DEALER, server.requests_endpoint)
    sock.send(encode(Ask("mine", " ")))
    assert msgspec.convert(replies(sock)[0], Error).id == "mine"
