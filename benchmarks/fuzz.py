"""Sends malformed messages to a server, and a good question after each hundred, which must be answered.

python -m benchmarks.fuzz [--bundle BUNDLE] [--messages 10000] [--seed 1]
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import socket
import sys
import time
from pathlib import Path

import msgspec
import zmq

from benchmarks.served import CLIP, resident_bytes, served
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.client import Client
from sonoedge.runtime.protocol import MAX_MESSAGE_BYTES, MAX_WIRE_BYTES, decode_reply

HUNDRED = 100
SETTLE_MS = 100
QUESTION = "Is a lesion visible?"
ANSWER_WITHIN_S = 20.0  # however often the server says when to come back
_TCP = re.compile(r"tcp://([^:]+):(\d+)")
_WELL_FORMED = (
    {"type": "ask", "v": 1, "id": "f", "question": "What is shown?", "max_tokens": 1},
    {"type": "cancel", "v": 1, "id": "f"},
    {"type": "status", "v": 1, "id": "f"},
)


class Fuzzed(msgspec.Struct, frozen=True):
    """What came of the messages; a good question is asked on a connection of its own."""

    messages: int
    error_replies: int
    other_replies: int  # damage may leave a message well-formed
    good_questions: int
    good_answers: int
    slowest_answer_ms: float
    seconds: float


class FuzzedServer(msgspec.Struct, frozen=True):
    """The last line: the counts, and the memory of the server before the first message and after the last."""

    fuzzed: Fuzzed
    resident_before_bytes: int
    resident_after_bytes: int
    exit_status: int


def malformed(rng: random.Random) -> list[bytes]:
    """Return the parts of one message that is wrong, or most likely wrong, in one of a dozen ways."""
    good = dict(rng.choice(_WELL_FORMED))
    packed = msgspec.msgpack.encode(good)
    match rng.randrange(12):
        case 0:
            return [rng.randbytes(rng.randrange(200))]
        case 1:
            return [packed[: rng.randrange(len(packed))]]
        case 2:
            flipped = bytearray(packed)
            for _ in range(rng.randint(1, 4)):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return [bytes(flipped)]
        case 3:  # nested deeper than any stack
            depth = rng.choice((50, 5000, 60_000))
            return [rng.choice((b"\x91", b"\x81\xa1a")) * depth]
        case 4:  # a length of four thousand million, and nothing behind it
            return [rng.choice((b"\xdd", b"\xdf", b"\xdb", b"\xc6")) + b"\xff" * 4 + rng.randbytes(8)]
        case 5:
            wrong: object = rng.choice((None, -1, 2**63, 1e308, [], {}, True, "\0", b"\xff", "a" * 1000))
            return [msgspec.msgpack.encode(good | {rng.choice(list(good)): wrong})]
        case 6:
            return [msgspec.msgpack.encode(good | {"v": rng.choice((0, 2, -5, 10**6))})]
        case 7:
            return [msgspec.msgpack.encode(good | {rng.choice(("__class__", "exec", "ID", "")): 1})]
        case 8:  # no text at all
            return [packed.replace(b"What", b"\xc3\x28\xff\xfe").replace(b"status", b"st\xedtus")]
        case 9:
            return [rng.choice((b"", packed, b"x")) for _ in range(rng.randint(2, 20))]
        case 10:
            return [msgspec.msgpack.encode(good | {"id": "f" * rng.randint(129, 5000)})]
        case _:
            return [b"\xa5" * (MAX_MESSAGE_BYTES + rng.randrange(1000))]


def fuzz(endpoint: str, messages: int, seed: int) -> Fuzzed:
    """Send `messages` malformed ones; raises SonoEdgeError when a good question in between is not answered in time."""
    rng = random.Random(seed)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    rubbish = _dealer(context, endpoint)
    counts = [0, 0]  # replies that are no errors, and errors
    good, slowest_ms, began = 0, 0.0, time.monotonic()
    try:
        for number in range(1, messages + 1):
            if rng.random() < 0.005:  # a giant ends its connection; noise is no ZeroMQ at all
                _count(rubbish, counts, SETTLE_MS)  # what was sent before it must arrive
                _noise(endpoint, rng)
                rubbish.send(bytes(MAX_WIRE_BYTES + 1))
                rubbish.close()
                rubbish = _dealer(context, endpoint)
            else:
                rubbish.send_multipart(malformed(rng))
            _count(rubbish, counts, 0)
            if number % HUNDRED == 0:
                _count(rubbish, counts, SETTLE_MS)
                slowest_ms = max(slowest_ms, _ask(endpoint))
                good += 1
        _count(rubbish, counts, 5 * SETTLE_MS)
    finally:
        rubbish.close()
        context.term()
    seconds = round(time.monotonic() - began, 1)
    return Fuzzed(messages, counts[True], counts[False], messages // HUNDRED, good, round(slowest_ms, 1), seconds)


def _count(sock: zmq.Socket[bytes], counts: list[int], silence_ms: int) -> None:
    """Count replies until none comes for `silence_ms`."""
    while sock.poll(silence_ms):
        counts[_is_error(sock.recv_multipart())] += 1


def _dealer(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> zmq.Socket[bytes]:
    sock = context.socket(zmq.DEALER)
    sock.set(zmq.LINGER, 500)
    sock.set(zmq.SNDTIMEO, 10_000)
    sock.connect(endpoint)
    return sock


def _noise(endpoint: str, rng: random.Random) -> None:
    """Speak something that is not ZMTP to the port."""
    match = _TCP.fullmatch(endpoint)
    if match is not None:
        with contextlib.suppress(OSError), socket.create_connection((match[1], int(match[2])), 1) as raw:
            raw.sendall(rng.choice((b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(300), b"\xff" + bytes(8) + b"\x7f\x03")))


def _is_error(parts: list[bytes]) -> bool:
    return type(decode_reply(parts[-1])).__name__ == "Error"


def _ask(endpoint: str) -> float:
    """Milliseconds until a good question has its answer, busy replies included."""
    began = time.monotonic()
    with Client(endpoint, timeout_s=ANSWER_WITHIN_S) as client:
        while not _answered(client):
            if time.monotonic() > began + ANSWER_WITHIN_S:
                raise SonoEdgeError(f"{endpoint} was busy for {ANSWER_WITHIN_S:g} s: its queue does not empty")
            time.sleep(0.05)
    return (time.monotonic() - began) * 1000


def _answered(client: Client) -> bool:
    """Whether a question got its answer; False when the server says when to come back."""
    try:
        client.answer(QUESTION, max_tokens=8)
    except SonoEdgeError as error:
        if "retry in" not in str(error):
            raise
        return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("demo_out/bundle"))
    parser.add_argument("--messages", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with served(options.bundle, str(CLIP), fps=10.0) as server:
        before = resident_bytes(server.pid)
        fuzzed = fuzz(server.bind, options.messages, options.seed)
        after = resident_bytes(server.pid)
    print(f"{fuzzed.good_answers} of {fuzzed.good_questions} good questions answered", file=sys.stderr)
    print(msgspec.json.encode(FuzzedServer(fuzzed, before, after, server.exit_status())).decode())
