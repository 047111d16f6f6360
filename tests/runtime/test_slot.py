"""The latest-frame slot, the question queue and the latency window."""

import threading
import time
from collections.abc import Callable

import pytest

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.latency import LatencyWindow
from sonoedge.runtime.protocol import Ask
from sonoedge.runtime.questions import Question, QuestionQueue
from sonoedge.runtime.sight import Sight
from sonoedge.runtime.slot import LatestFrameSlot
from sonoedge.runtime.wire import Envelope

Shade = Callable[..., Frame]


def test_the_latest_frame_wins_and_drops_are_counted(shade: Shade) -> None:
    slot = LatestFrameSlot()
    for number in range(3):
        slot.put(shade(0, number))
    assert slot.full
    frame = slot.get(0)
    assert frame is not None
    assert (frame.sequence, slot.dropped, slot.received) == (2, 2, 3)
    assert slot.get(0) is None
    assert slot.newest is frame


def test_get_waits_for_a_frame_and_wakes(shade: Shade) -> None:
    slot = LatestFrameSlot()
    frame = shade(0)
    threading.Timer(0.05, slot.put, [frame]).start()
    assert slot.get(5) is frame
    threading.Timer(0.05, slot.wake).start()
    began = time.monotonic()
    assert slot.get(5) is None
    assert time.monotonic() - began < 4
    slot.wake()
    assert slot.get(5) is None


def test_no_frame_is_lost_uncounted_between_threads(shade: Shade) -> None:
    slot, taken = LatestFrameSlot(), 0
    frames = [shade(0, number, (1, 1)) for number in range(500)]

    def feed() -> None:
        for frame in frames:
            slot.put(frame)

    feeder = threading.Thread(target=feed)
    feeder.start()
    while feeder.is_alive() or slot.full:
        taken += slot.get(0.001) is not None
    assert taken + slot.dropped == slot.received == 500


def question(shade: Shade, client: bytes, name: str) -> Question:
    return Question(Envelope(client, False), Ask(name, "?"), (Sight(shade(0)),), time.monotonic_ns(), threading.Event())


def test_the_queue_is_bounded_and_says_when_to_come_back(shade: Shade) -> None:
    queue = QuestionQueue(2)
    first, second = question(shade, b"a", "1"), question(shade, b"b", "1")
    assert queue.put(first) is None
    assert queue.put(second) is None
    assert "busy, retry in" in str(queue.put(question(shade, b"c", "1")))
    assert queue.retry_ms >= 10
    assert queue.take() is first
    queue.finish(first, 100.0)
    assert queue.put(question(shade, b"c", "1")) is None
    assert len(queue) == 2


def test_one_client_uses_an_id_once_at_a_time(shade: Shade) -> None:
    queue = QuestionQueue(5)
    assert queue.put(question(shade, b"a", "1")) is None
    assert "another id" in str(queue.put(question(shade, b"a", "1")))


def test_cancel_reaches_one_question_or_all_of_a_client(shade: Shade) -> None:
    queue = QuestionQueue(5)
    mine = [question(shade, b"a", "1"), question(shade, b"a", "2")]
    other = question(shade, b"b", "1")
    for each in (*mine, other):
        queue.put(each)
    assert queue.cancel(b"a", "1")
    assert [q.cancel.is_set() for q in (*mine, other)] == [True, False, False]
    assert queue.cancel(b"a")
    assert [q.cancel.is_set() for q in (*mine, other)] == [True, True, False]
    assert not queue.cancel(b"a", "9")


def test_latencies_are_those_of_the_window() -> None:
    window = LatencyWindow(100)
    assert window.percentiles() == (None, None, None)
    for number in range(1000):
        window.record(number)
    p50, p95, p99 = window.percentiles()
    assert p50 == pytest.approx(949.5)
    assert p95 == pytest.approx(994.05)
    assert p99 == pytest.approx(998.01)
