"""What clients do: they die in the middle of an answer, all come at once, stop reading, or send rubbish."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from benchmarks.fuzz import fuzz

from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.protocol import Answer, Ask, Error, Hint, Status, Token, decode_reply, encode

ServeProcess = Callable[..., Any]
Stopwatch = Callable[..., float]
AskStatus = Callable[[str], Status | None]

ASK_AND_TELL = """
import sys
from sonoedge.runtime.client import Client

with Client(sys.argv[1], timeout_s=60) as client:
    for reply in client.ask("Why? " * 600):
        print(type(reply).__name__, flush=True)
"""


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_client_killed_in_the_middle_of_its_answer_costs_the_next_nothing(
    serve_process: ServeProcess, clip: Path, status: AskStatus, stopwatch: Stopwatch
) -> None:
    bind = serve_process(clip).ready["bind"]
    doomed = subprocess.Popen([sys.executable, "-c", ASK_AND_TELL, bind], stdout=subprocess.PIPE, text=True)
    assert doomed.stdout is not None
    assert doomed.stdout.readline() == "Token\n"
    with Client(bind, timeout_s=60) as client:
        waiting = client.ask("What is this?")  # queued behind the doomed one's
        doomed.kill()
        doomed.communicate()
        killed_s = time.monotonic()
        *tokens, answer = waiting
        recovered_s = time.monotonic() - killed_s
    assert isinstance(answer, Answer)
    assert answer.finish == "stop"
    assert "".join(token.text for token in tokens if isinstance(token, Token)) == answer.answer
    print(f"answered {recovered_s:.2f} s after the kill")
    assert recovered_s < 5

    def empty() -> bool:
        now = status(bind)
        return now is not None and now.queued == 0

    stopwatch(empty, within_s=5)


def test_two_hundred_clients_at_once_are_all_answered(serve_process: ServeProcess, clip: Path) -> None:
    bind = serve_process(clip, "--fps", "5").ready["bind"]
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    poller = zmq.Poller()
    sockets: list[zmq.Socket[bytes]] = []
    ask = encode(Ask("q", "Is a lesion visible?"))
    began, refused = time.monotonic(), 0
    try:
        for _ in range(200):
            sock = context.socket(zmq.DEALER)
            sock.set(zmq.LINGER, 0)
            sock.connect(bind)
            sock.send(ask)
            poller.register(sock, zmq.POLLIN)
            sockets.append(sock)
        open_ones, again = set(sockets), {}
        while open_ones:
            assert time.monotonic() < began + 60, f"{len(open_ones)} clients still wait"
            for sock, _ in poller.poll(20):
                match decode_reply(sock.recv()):
                    case Answer() as answer:
                        assert answer.answer in ("yes", "no")
                        open_ones.discard(sock)
                    case Error() as error:  # bounded: refused in words, with the time to come back
                        assert error.retry_ms is not None, error.message
                        refused += 1
                        again[sock] = time.monotonic() + error.retry_ms / 1000
            for sock in [sock for sock, due_s in again.items() if due_s <= time.monotonic()]:
                del again[sock]
                sock.send(ask)
    finally:
        for sock in sockets:
            sock.close()
        context.term()
    print(f"200 answered in {time.monotonic() - began:.1f} s, {refused} times told to come back")
    assert refused > 0


def test_a_subscriber_that_stops_reading_holds_up_nobody(serve_process: ServeProcess, clip: Path) -> None:
    process = serve_process(clip, "--fps", "60")
    endpoint = process.ready["hints_bind"]
    code = "import sys; from sonoedge.cli import main; sys.exit(main())"
    slow = subprocess.Popen([sys.executable, "-c", code, "watch", endpoint, "--json"], stdout=subprocess.PIPE)
    assert slow.stdout is not None
    slow.stdout.readline()
    slow.send_signal(signal.SIGSTOP)
    try:
        frames: list[int] = []
        ages_ms: list[float] = []
        before = 0
        for message in listen(endpoint, timeout_s=10):
            if isinstance(message, Hint):
                if not frames or message.frame != frames[-1]:
                    frames.append(message.frame)
                ages_ms.append(message.age_ms)
                if len(frames) == 20 and not before:
                    before = resident_bytes(process.popen.pid)
                if len(frames) == 120:
                    break
        grown = resident_bytes(process.popen.pid) - before
    finally:
        slow.kill()
        slow.communicate()
    with Client(process.ready["bind"], timeout_s=10) as client:
        telemetry = client.status().telemetry
    missed = frames[-1] - frames[0] + 1 - len(frames)
    print(f"{len(frames)} heard, {missed} missed, {telemetry.dropped} never looked at, {grown / 2**20:.1f} MiB more")
    assert missed <= telemetry.dropped + telemetry.failed  # whatever the model saw came through
    assert grown < 16 * 2**20  # a thousand messages at most wait for the one that sleeps


def test_rubbish_gets_an_error_or_nothing_and_good_questions_their_answer(
    serve_process: ServeProcess, clip: Path
) -> None:
    process = serve_process(clip, "--fps", "10")
    result = fuzz(process.ready["bind"], 400, seed=7)
    assert process.popen.poll() is None
    assert result.messages == 400
    assert result.good_answers == result.good_questions == 4
    assert result.error_replies > 50
    process.popen.terminate()
    _, err = process.popen.communicate(timeout=30)
    assert (process.popen.returncode, err) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_ends_every_open_question_with_a_reply(
    serve_process: ServeProcess, clip: Path, number: signal.Signals
) -> None:
    process = serve_process(clip)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(4)]
    try:
        for sock in sockets:
            sock.set(zmq.LINGER, 0)
            sock.set(zmq.RCVTIMEO, 10_000)
            sock.connect(process.ready["bind"])
            sock.send(encode(Ask("q", "Why? " * 600)))
        assert isinstance(decode_reply(sockets[0].recv()), Token)
        process.popen.send_signal(number)
        began = time.monotonic()
        ends = []
        for sock in sockets:
            reply = decode_reply(sock.recv())
            while isinstance(reply, Token):
                reply = decode_reply(sock.recv())
            ends.append(reply)
        out, err = process.popen.communicate(timeout=10)
        drained_s = time.monotonic() - began
    finally:
        for sock in sockets:
            sock.close()
        context.term()
    assert (process.popen.returncode, err) == (0, "")
    assert all(isinstance(end, Answer | Error) and end.id == "q" for end in ends)
    assert msgspec.json.decode(out.splitlines()[-1])["type"] == "telemetry"
    print(f"drained in {drained_s:.2f} s")
    assert drained_s < 5
