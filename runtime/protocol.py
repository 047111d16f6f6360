"""Every message on the wire: tagged msgpack maps with a version, one typed definition for both ends.

Requests go to the ROUTER as `[payload]` (DEALER) or `["", payload]` (REQ); replies come back in the same form. Hints,
state and telemetry are single-part messages on the PUB.
"""

from typing import Annotated, Any, Literal

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.generate import Finish
from sonoedge.runtime.hints import HintSchema, Text
from sonoedge.runtime.sources import SourceState

VERSION = 1
MAX_MESSAGE_BYTES = 64 * 1024  # larger requests get an error reply
MAX_PICTURE_PX = 800
MAX_WIRE_BYTES = 1024 * 1024  # larger ones end their sender's connection before they fill memory; no reply is larger
LIVE = "live"  # the name of the newest frame

Id = Annotated[str, msgspec.Meta(max_length=128)] | int
Words = Annotated[str, msgspec.Meta(min_length=1, max_length=16_384)]
FrameName = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
FrameNames = Annotated[tuple[FrameName, ...], msgspec.Meta(max_length=4)]
Choice = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
MaxTokens = Annotated[int, msgspec.Meta(ge=1, le=4096)]
DeadlineMs = Annotated[int, msgspec.Meta(ge=1, le=3_600_000)]
Language = Literal["en", "zh"]


class ProtocolError(SonoEdgeError):
    """A message that cannot be understood; `request_id` is there when that much could be read."""

    def __init__(self, message: str, request_id: str | int | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class Turn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An earlier question of a conversation, and what was answered."""

    question: Words
    answer: Annotated[str, msgspec.Meta(max_length=16_384)]


class Ask(msgspec.Struct, frozen=True, tag="ask", forbid_unknown_fields=True):
    """Asks about pictures; `stream` None means: token messages unless the envelope has a REQ delimiter.

    `frames` names the pictures in the order in which the model sees them (none: the newest), `turns` are what was said
    about them before, `choices` the only answers there are: one of them is chosen, nothing is written.
    """

    id: Id
    question: Words
    language: Language | None = None  # of the system turn; None: that before hints
    max_tokens: MaxTokens = 256
    deadline_ms: DeadlineMs | None = None
    stream: bool | None = None
    v: int = VERSION
    frames: FrameNames = ()
    turns: Annotated[tuple[Turn, ...], msgspec.Meta(max_length=16)] = ()
    choices: Annotated[tuple[Choice, ...], msgspec.Meta(max_length=10)] = ()


class Report(msgspec.Struct, frozen=True, tag="report", forbid_unknown_fields=True):
    """Asks for a report in a language; the rest as in `Ask`."""

    id: Id
    language: Language = "en"
    frames: FrameNames = ()
    max_tokens: MaxTokens = 256
    deadline_ms: DeadlineMs | None = None
    stream: bool | None = None
    v: int = VERSION


class Freeze(msgspec.Struct, frozen=True, tag="freeze", forbid_unknown_fields=True):
    """Keeps the newest frame under a name (None: its number), or releases what is kept under that name."""

    id: Id
    name: FrameName | None = None
    release: bool = False
    v: int = VERSION


class Cancel(msgspec.Struct, frozen=True, tag="cancel", forbid_unknown_fields=True):
    """Ends the question `id` of the same client; its answer comes with what there is."""

    id: Id
    v: int = VERSION


class StatusRequest(msgspec.Struct, frozen=True, tag="status", forbid_unknown_fields=True):
    """Asks for the counters."""

    id: Id | None = None
    v: int = VERSION


class PictureRequest(msgspec.Struct, frozen=True, tag="picture", forbid_unknown_fields=True):
    """Asks for a frame, the newest or a frozen one, as the model sees it."""

    id: Id
    v: int = VERSION
    name: FrameName = LIVE


class SchemaRequest(msgspec.Struct, frozen=True, tag="schema", forbid_unknown_fields=True):
    """Asks which questions hints answer, and for the JSON Schema of every message."""

    id: Id
    v: int = VERSION


class Token(msgspec.Struct, frozen=True, tag="token"):
    """The next characters of an answer, and what they are about."""

    id: Id
    text: str
    v: int = VERSION
    frame: int | None = None
    age_ms: float | None = None
    model: str | None = None
    intended_use: str | None = None


class NamedFrame(msgspec.Struct, frozen=True):
    """A frame under the name that a client gave it."""

    name: str
    frame: int
    age_ms: float


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """A whole answer: about which frame, how old that is, how many tokens and milliseconds it took, why it ended.

    `frame` and `age_ms` are of the first picture, `frames` of each when some were named. `reason` is what speaks
    against a picture, None where nothing is known; a single choice then abstains, with `answer` empty.
    """

    id: Id
    answer: str
    frame: int
    age_ms: float
    model: str
    intended_use: str
    tokens: int
    ms: float
    finish: Finish
    v: int = VERSION
    frames: tuple[NamedFrame, ...] = ()
    candidates: dict[str, float] | None = None  # probability of each choice, as the model gives it: not calibrated
    abstain: bool = False
    reason: str | None = None


class Frozen(msgspec.Struct, frozen=True, tag="frozen"):
    """The reply to a freeze request: the frame that is kept under the name, or was until now."""

    id: Id
    name: str
    released: bool
    frame: int
    age_ms: float
    model: str
    intended_use: str
    v: int = VERSION


class Picture(msgspec.Struct, frozen=True, tag="picture"):
    """A frame, cropped as for the model, as a JPEG of at most `MAX_PICTURE_PX` a side; `reason`: why it is poor."""

    id: Id
    jpeg: bytes
    frame: int
    age_ms: float
    width: int
    height: int
    v: int = VERSION
    model: str | None = None
    intended_use: str | None = None
    reason: str | None = None


class SchemaReply(msgspec.Struct, frozen=True, tag="schema"):
    """The hint schema, and in `messages` the JSON Schema of every message (docs/protocol.schema.json)."""

    id: Id
    schema: HintSchema
    v: int = VERSION
    messages: dict[str, Any] = {}


class Error(msgspec.Struct, frozen=True, tag="error"):
    """A request that was refused; `retry_ms` says when it may succeed."""

    message: str
    id: Id | None = None
    retry_ms: int | None = None
    v: int = VERSION


class Percentiles(msgspec.Struct, frozen=True):
    """Of the newest latencies of one stage."""

    p50_ms: float
    p95_ms: float
    p99_ms: float


class Telemetry(msgspec.Struct, frozen=True, tag="telemetry"):
    """Counters since the start; latencies from capture to wire over the last frames, None before the first."""

    frames: int  # came from the source
    dropped: int  # replaced by a newer one before the model saw them
    hinted: int
    failed: int  # could not be looked at
    hints: int
    questions: int  # answered
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    v: int = VERSION
    abstentions: int = 0  # of the hints
    # From capture to wire: wait (for the worker), sector (crop, gate), look (preprocessing, vision tower), hints, wire.
    stages: dict[str, Percentiles] = {}
    resident_bytes: int | None = None  # memory of the server; None where the system does not tell
    gated: int = 0  # frames that were too poor to be asked about


class State(msgspec.Struct, frozen=True, tag="state"):
    """What the source is doing; `detail` says what went wrong last."""

    state: SourceState
    name: str
    detail: str | None = None
    v: int = VERSION


class Status(msgspec.Struct, frozen=True, tag="status"):
    """The reply to a status request."""

    id: Id | None
    model: str
    intended_use: str
    source: State
    telemetry: Telemetry
    queued: int
    v: int = VERSION
    frozen: tuple[NamedFrame, ...] = ()


class Hint(msgspec.Struct, frozen=True, tag="hint"):
    """One hint about one frame; `answer` and `text` are None when it abstains, `candidates` are always there."""

    hint: str
    answer: str | None
    text: Text | None
    probability: float
    abstain: bool
    reason: str | None
    frame: int
    age_ms: float
    model: str
    intended_use: str
    captured_ns: int  # on the server's monotonic clock
    source: str
    candidates: dict[str, float]
    v: int = VERSION
    # Candidates that hold the right one in a share `coverage` of frames as those of calibration (None: not calibrated).
    set: tuple[str, ...] = ()
    coverage: float | None = None
    valid_ms: int | None = None  # from capture on; an older hint says nothing any more


Request = Ask | Report | Cancel | Freeze | StatusRequest | PictureRequest | SchemaRequest
Reply = Token | Answer | Error | Frozen | Status | Picture | SchemaReply
Broadcast = Hint | State | Telemetry


class _Header(msgspec.Struct):
    type: str
    v: int = VERSION
    id: Id | None = None  # one that is too long could not be sent back either


_header = msgspec.msgpack.Decoder(_Header)
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_broadcasts: msgspec.msgpack.Decoder[Broadcast] = msgspec.msgpack.Decoder(Broadcast)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def encode(message: Request | Reply | Broadcast) -> bytes:
    """Return the message as msgpack."""
    return msgspec.msgpack.encode(message)


def decode_request(payload: bytes) -> Request:
    """Read a request; raises ProtocolError naming what is wrong with it."""
    header = _read_header(payload)
    try:
        return _requests.decode(payload)
    except _UNREADABLE as error:
        raise ProtocolError(f"the {header.type!r} request is wrong: {error}; correct that field", header.id) from error


def decode_reply(payload: bytes) -> Reply:
    """Read a reply; raises ProtocolError when the server speaks another version."""
    _read_header(payload, MAX_WIRE_BYTES)
    try:
        return _replies.decode(payload)
    except _UNREADABLE as error:
        raise ProtocolError(f"the server's reply is wrong: {error}; update sonoedge on the older side") from error


def decode_broadcast(payload: bytes) -> Broadcast:
    """Read a hint, state or telemetry message; raises ProtocolError when the server speaks another version."""
    _read_header(payload)
    try:
        return _broadcasts.decode(payload)
    except _UNREADABLE as error:
        raise ProtocolError(f"the published message is wrong: {error}; update sonoedge on the older side") from error


def _read_header(payload: bytes, most_bytes: int = MAX_MESSAGE_BYTES) -> _Header:
    if len(payload) > most_bytes:
        raise ProtocolError(f"the message has {len(payload)} bytes, more than {most_bytes}: send a shorter one")
    try:
        header = _header.decode(payload)
    except _UNREADABLE as error:
        raise ProtocolError(
            f"the message is no sonoedge message ({error}): send a msgpack map with type and v"
        ) from error
    if header.v != VERSION:
        raise ProtocolError(f"the message has version {header.v}, not {VERSION}: update the older side", header.id)
    return header
