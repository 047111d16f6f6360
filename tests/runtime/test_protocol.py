"""The wire: what is refused, with which words, and that nothing else escapes."""

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonoedge.runtime.hints import Text
from sonoedge.runtime.protocol import (
    MAX_MESSAGE_BYTES,
    VERSION,
    Answer,
    Ask,
    Cancel,
    Error,
    Hint,
    ProtocolError,
    State,
    StatusRequest,
    Token,
    decode_broadcast,
    decode_reply,
    decode_request,
    encode,
)


def packed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


def test_every_message_survives() -> None:
    for request in (Ask("1", "What?", "zh", 9, 100), Ask(1, "What?"), Cancel("1"), StatusRequest()):
        assert decode_request(encode(request)) == request
    for reply in (Token("1", "é"), Answer("1", "a", 3, 1.5, "m", "use", 2, 3.5, "stop"), Error("no", retry_ms=5)):
        assert decode_reply(encode(reply)) == reply
    text = Text(en="cyst", zh="囊肿")
    hint = Hint("kind", "cyst", text, 0.9, False, None, 3, 1.5, "m", "use", 99, "clip", {"cyst": 0.9})
    for message in (hint, State("live", "clip")):
        assert decode_broadcast(encode(message)) == message


def test_fields_have_their_promised_names() -> None:
    hint = Hint("kind", None, None, 0.4, True, "low confidence", 3, 1.5, "m", "use", 99, "clip", {"cyst": 0.4})
    fields = msgspec.msgpack.decode(encode(hint))
    promised = {"hint", "answer", "text", "probability", "abstain", "reason", "frame", "age_ms", "model"}
    promised |= {"intended_use", "captured_ns", "source", "candidates", "set", "coverage", "valid_ms", "type", "v"}
    assert promised == set(fields)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "no sonoedge message"),
        (b"hello", "no sonoedge message"),
        (b"\xc1", "no sonoedge message"),
        (b"\xa2\xff\xff", "no sonoedge message"),
        (b"\x91" * 60_000, "no sonoedge message"),
        (b"\x81\xa1x" * 20_000, "no sonoedge message"),
        (packed(v=1), "type"),
        (packed(type="ask", v=VERSION + 1, id="7"), f"version {VERSION + 1}, not {VERSION}"),
        (packed(type="fly", v=1), "'fly'"),
        (packed(type="hint", v=1), "hint"),
        (packed(type="ask", v=1, id="7"), "question"),
        (packed(type="ask", v=1, id="7", question=5), r"\$\.question"),
        (packed(type="ask", v=1, id="7", question=""), r"\$\.question"),
        (packed(type="ask", v=1, id="7", question="?", language="fr"), r"\$\.language"),
        (packed(type="ask", v=1, id="7", question="?", max_tokens=0), r"\$\.max_tokens"),
        (packed(type="ask", v=1, id="7", question="?", max_token=5), "max_token"),
        (packed(type="ask", v=1, id="7" * 200, question="?"), r"\$\.id"),
        (packed(type="ask", v=1, id="7", question="?" * MAX_MESSAGE_BYTES), "more than 65536"),
    ],
)
def test_wrong_requests_are_refused_by_field(payload: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as refusal:
        decode_request(payload)
    if b"\xa17" in payload and len(payload) < MAX_MESSAGE_BYTES:
        assert refusal.value.request_id == "7"


@settings(deadline=None)
@given(st.binary(max_size=200) | st.binary(max_size=50).map(lambda tail: packed(type="ask", v=1)[:-1] + tail))
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    for decode in (decode_request, decode_reply, decode_broadcast):
        with contextlib.suppress(ProtocolError):
            decode(payload)
