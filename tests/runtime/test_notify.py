"""systemd's notification protocol over a real datagram socket."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sonoedge.runtime.notify import Notifier

Make = Callable[..., Notifier]


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(0.2)
        yield sock


@pytest.fixture
def make(inbox: socket.socket) -> Iterator[Make]:
    made: list[Notifier] = []

    def notifier(**environment: str) -> Notifier:
        made.append(Notifier({"NOTIFY_SOCKET": inbox.getsockname(), **environment}))
        return made[-1]

    yield notifier
    for one in made:
        one.close()


def silent(inbox: socket.socket) -> bool:
    try:
        inbox.recv(4096)
    except TimeoutError:
        return True
    return False


def test_it_says_how_the_service_is(inbox: socket.socket, make: Make) -> None:
    notifier = make()
    notifier.ready("two\nlines")
    assert inbox.recv(4096) == b"READY=1\nSTATUS=two lines"
    notifier.status("source lost")
    assert inbox.recv(4096) == b"STATUS=source lost"
    notifier.status("source lost")  # said already
    notifier.stopping()
    assert inbox.recv(4096) == b"STOPPING=1\nSTATUS=draining"


def test_the_watchdog_is_fed_at_half_its_interval_by_progress_alone(inbox: socket.socket, make: Make) -> None:
    notifier = make(WATCHDOG_USEC="400000", WATCHDOG_PID=str(os.getpid()))
    assert notifier.watchdog_s == 0.4
    began = time.monotonic()
    fed, beats = [], 0
    while time.monotonic() < began + 1.0:
        beats += 1
        notifier.progress((beats, beats))
        inbox.settimeout(0.01)
        try:
            assert inbox.recv(4096) == b"WATCHDOG=1"
            fed.append(time.monotonic() - began)
        except TimeoutError:
            pass
    assert 4 <= len(fed) <= 6
    inbox.settimeout(0.2)
    time.sleep(0.25)
    notifier.progress((beats + 1, beats + 1))
    assert inbox.recv(4096) == b"WATCHDOG=1"
    time.sleep(0.25)
    for turn in range(2, 7):  # the I/O thread turns, the worker stands still
        notifier.progress((beats + turn, beats + 1))
    assert silent(inbox)
    notifier.progress((beats + 10, beats + 2))
    assert inbox.recv(4096) == b"WATCHDOG=1"


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"}])
def test_nobody_who_watches_is_not_fed(inbox: socket.socket, make: Make, environment: dict[str, str]) -> None:
    notifier = make(**environment)
    notifier.progress((1,))
    assert silent(inbox)


def test_an_abstract_socket_works() -> None:
    name = f"sonoedge-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind("\0" + name)
        inbox.settimeout(5)
        notifier = Notifier({"NOTIFY_SOCKET": "@" + name})
        notifier.ready("here")
        notifier.close()
        assert inbox.recv(4096).startswith(b"READY=1")


def test_without_a_supervisor_nothing_happens() -> None:
    notifier = Notifier({})
    notifier.ready("here")
    notifier.progress((1,))
    notifier.stopping()
    notifier.close()


def test_a_supervisor_that_left_or_does_not_read_stops_nothing(
    tmp_path: Path, inbox: socket.socket, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    gone.ready("here")
    gone.close()
    notifier = make()
    for number in range(2000):  # more than the socket takes
        notifier.status(str(number))
    assert caplog.text.count("does not read") == 2  # once each, not once a message
