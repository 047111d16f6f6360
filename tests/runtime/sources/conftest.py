"""Fixtures of the live feeds' tests: a feed watched on a thread, peers in processes of their own."""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.sources import Source, open_source


class Watch:
    """Iterates a feed on a thread and keeps what came, and when."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.frames: list[Frame] = []
        self.arrived_ns: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for frame in self.source:
            self.arrived_ns.append(time.monotonic_ns())
            self.frames.append(frame)

    def until(self, true: Callable[[], object], within_s: float) -> float:
        """Wait until something is so, and return the seconds that it took."""
        began = time.monotonic()
        while not true():
            told = f"{self.source.state}, {self.source.detail}, {len(self.frames)} frames"
            assert time.monotonic() - began < within_s, f"not within {within_s} s: {told}"
            time.sleep(0.005)
        return time.monotonic() - began

    def until_frames(self, more: int, within_s: float = 10.0) -> float:
        return self.until_total(len(self.frames) + more, within_s)

    def until_total(self, count: int, within_s: float = 10.0) -> float:
        return self.until(lambda: len(self.frames) >= count, within_s)

    def until_state(self, state: str, within_s: float = 10.0) -> float:
        return self.until(lambda: self.source.state == state, within_s)

    def says(self) -> tuple[str, str | None]:
        """What the feed says of itself now."""
        return self.source.state, self.source.detail

    def end(self) -> None:
        self.source.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        assert self.source.state == "ended"


@contextlib.contextmanager
def watch_over(feed: str | Source, **options: bool) -> Iterator[Watch]:
    """Watch a feed, or the one that is opened by its name, until the end of the block."""
    watch = Watch(open_source(feed, **options) if isinstance(feed, str) else feed)
    try:
        yield watch
    finally:
        watch.end()


@contextlib.contextmanager
def run_child(*command: str) -> Iterator["subprocess.Popen[str]"]:
    """A peer process that has said that it is ready; killed at the end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "ready"
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def port() -> int:
    """A TCP port of loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
def watched() -> Callable[..., contextlib.AbstractContextManager[Watch]]:
    """Watch a feed: `with watched("ipc:///tmp/frames", once=True) as watch:`."""
    return watch_over


@pytest.fixture
def child() -> Callable[..., contextlib.AbstractContextManager["subprocess.Popen[str]"]]:
    """Run a peer: `with child(sys.executable, "-c", CODE) as process:`."""
    return run_child
