"""What every live feed says of itself, with a peer in memory."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sonoedge.runtime.sources.feed import LiveFeed, LostError, Picture

Context = Callable[..., contextlib.AbstractContextManager[Any]]  # the fixtures `watched` and `child`


class Peer(LiveFeed):
    """A feed whose peer a test plays."""

    silence_s = 0.8

    def __init__(self) -> None:
        super().__init__("peer", once=False, fps=100)
        self.there, self.sending, self.size, self.connections = True, True, (4, 6), 0
        self.connect()
        self.linked()

    def connect(self) -> None:
        if not self.there:
            raise LostError("nobody answers")
        self.connections += 1

    def receive(self, wait_s: float) -> Picture | None:
        time.sleep(0.01)
        if not self.there:
            raise LostError("it was unplugged")
        return Picture(np.zeros((*self.size, 3), np.uint8), time.monotonic_ns()) if self.sending else None

    def disconnect(self) -> None:
        pass


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, watched: Context) -> Iterator[tuple[Peer, Any]]:
    monkeypatch.setattr("sonoedge.runtime.sources.silence.STALL_S", 0.3)
    monkeypatch.setattr("sonoedge.runtime.sources.feed.FIRST_PAUSE_S", 0.02)
    feed = Peer()
    with watched(feed) as watch:
        yield feed, watch


def test_a_feed_stalls_says_for_how_long_and_connects_anew(peer: tuple[Peer, Any]) -> None:
    feed, watch = peer
    watch.until_state("live")
    assert feed.detail is None
    feed.sending = False
    assert 0.2 < watch.until_state("stalled") < 2
    assert re.fullmatch(r"connected but no frames for \d\.\d s", watch.says()[1] or "")
    watch.until(lambda: feed.connections > 1, 5)  # a peer without power says nothing
    assert watch.says()[0] == "stalled"  # and the new connection brought nothing yet
    assert float(str(watch.says()[1]).split()[-2]) >= 0.7
    feed.sending = True
    assert watch.until_state("live") < 0.5


def test_a_feed_that_is_lost_says_why_and_counts_on(peer: tuple[Peer, Any]) -> None:
    feed, watch = peer
    watch.until_frames(3)
    feed.there = False
    watch.until_state("lost")
    watch.until(lambda: feed.detail == "nobody answers", 2)
    count = len(watch.frames)
    feed.there = True
    watch.until_frames(3)
    assert [frame.sequence for frame in watch.frames[count - 1 : count + 2]] == [count - 1, count, count + 1]
    assert watch.says()[0] == "live"
    assert feed.detail is None


def test_a_change_of_size_is_noticed_and_told_for_a_while(
    peer: tuple[Peer, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, watch = peer
    watch.until_frames(3)
    assert feed.detail is None
    feed.size = (8, 10)
    watch.until(lambda: watch.frames[-1].image.shape == (8, 10, 3), 2)
    assert watch.says() == ("live", "the frames changed from 6 x 4 to 10 x 8 pixels")
    monkeypatch.setattr("sonoedge.runtime.sources.feed.NOTE_S", 0.0)
    assert feed.detail is None
