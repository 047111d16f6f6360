"""Replay of recorded feeds: faster, slower, and frame by frame."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.model import Model
from sonoedge.runtime.server import Server
from sonoedge.runtime.slot import LatestFrameSlot
from sonoedge.runtime.sources import open_source
from sonoedge.runtime.sources.pace import Pace
from sonoedge.runtime.sources.recorded import RecordedSource

WriteVideo = Callable[..., Path]


@pytest.mark.parametrize(("speed", "period_ms"), [(1.0, 50.0), (4.0, 12.5), (0.5, 100.0)])
def test_the_speed_multiplies_the_recorded_rate(write_video: WriteVideo, speed: float, period_ms: float) -> None:
    source = open_source(str(write_video(frames=5, fps=20)), once=True, speed=speed)
    stamps_ns = [frame.captured_ns for frame in source]
    assert source.fps == 20 * speed
    assert np.diff(stamps_ns).sum() / 1e6 == pytest.approx(4 * period_ms, rel=0.3)


def test_frame_by_frame_nothing_waits_for_its_time(write_video: WriteVideo) -> None:
    source = open_source(str(write_video(frames=3, fps=1)), step=True)
    began = time.monotonic()
    shades = [round(frame.image.mean() / 10) for frame in itertools.islice(source, 7)]
    assert shades == [0, 1, 2, 0, 1, 2, 0]
    assert time.monotonic() - began < 4  # 6 s at its own rate


def test_frame_by_frame_a_slow_model_sees_every_frame(
    write_video: WriteVideo, make_model: Callable[..., Model], start_server: Callable[..., Server]
) -> None:
    path = str(write_video(frames=12, fps=1000))
    dropped = {}
    for step in (True, False):
        source = open_source(path, once=True, step=step)
        server = start_server(source, make_model(step_s=0.003), wait_for_frame=False, step=step)
        assert server.wait(60)
        server.stop()
        dropped[step] = server.telemetry().dropped
        if step:
            assert server.telemetry().hinted == 12
    assert dropped[True] == 0
    assert dropped[False] > 0  # so the model was slow enough to tell


def test_a_reader_is_known_to_want_a_frame(shade: Callable[..., Any]) -> None:
    slot = LatestFrameSlot()
    assert not slot.wait_wanted(0)
    assert slot.get(0) is None
    assert slot.wait_wanted(0)
    slot.put(shade(1))
    assert not slot.wait_wanted(0)
    assert slot.get(0) is not None
    assert not slot.wait_wanted(0)  # it is still busy with that one
    thread = threading.Thread(target=slot.get, args=(5,))
    thread.start()
    assert slot.wait_wanted(5)
    slot.wake()
    thread.join(5)
    assert not thread.is_alive()


class SlowMedium(RecordedSource):
    """A recording on a medium that hangs until it is let go."""

    def __init__(self) -> None:
        super().__init__("slow", Pace(once=True), fps=100)
        self.hangs = threading.Event()

    def pictures(self) -> Iterator[npt.NDArray[np.uint8] | None]:
        yield np.zeros((4, 4, 3), np.uint8)
        self.hangs.wait(10)
        yield np.zeros((4, 4, 3), np.uint8)


def says(source: RecordedSource) -> tuple[str, str | None]:
    """What the feed says of itself now."""
    return source.state, source.detail


def test_a_medium_that_hangs_is_a_stall_and_a_slow_reader_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sonoedge.runtime.sources.silence.STALL_S", 0.1)
    source = SlowMedium()
    frames = iter(source)
    next(frames)
    time.sleep(0.2)  # the reader's own time
    assert says(source) == ("live", None)
    thread = threading.Thread(target=lambda: list(frames))
    thread.start()
    until = time.monotonic() + 5
    while source.state != "stalled" and time.monotonic() < until:
        time.sleep(0.01)
    assert (source.detail or "").startswith("connected but no frames for 0.")
    source.hangs.set()
    thread.join(5)
    assert not thread.is_alive()
    assert says(source) == ("ended", None)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), 1e6])
def test_a_wrong_speed_is_refused(write_video: WriteVideo, speed: float) -> None:
    with pytest.raises(SonoEdgeError, match="speed"):
        open_source(str(write_video(frames=4, fps=100)), speed=speed)


@pytest.mark.parametrize("options", [{"speed": 2.0}, {"step": True}])
def test_a_live_feed_has_no_other_pace(tmp_path: Path, options: dict[str, float]) -> None:
    endpoint = f"ipc://{tmp_path}/frames"
    with pytest.raises(SonoEdgeError, match=r"is live.*leave out"):
        open_source(endpoint, **options)  # type: ignore[arg-type]
