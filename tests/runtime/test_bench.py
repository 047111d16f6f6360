"""`sonoedge bench` on the smallest bundle: every stage has a time, and a source is closed before it is played."""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime import bench
from sonoedge.runtime.bench import BenchReport, MemorySource
from sonoedge.runtime.frame import Frame


@pytest.fixture(autouse=True)
def _fewer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "STAGE_RUNS", 3)
    monkeypatch.setattr(bench, "QUESTIONS", 2)


def test_a_report_on_frames_made_in_memory(tiny: Any, sonoedge: Any) -> None:
    ran = sonoedge("bench", tiny.bundle, "--seconds", 1, "--json")
    assert ran.status == 0, ran.err
    report = msgspec.json.decode(ran.last_line, type=BenchReport)
    assert report.model == tiny.report["model"]
    assert report.source == "memory"
    assert report.frames > 0
    assert report.capture_to_wire_ms["p50"] <= report.capture_to_wire_ms["p95"] <= report.capture_to_wire_ms["p99"]
    assert 0 < report.question_ms["p50"] <= report.question_ms["max"]
    assert len(report.stages_ms) == 5
    assert all(0 < value < 5000 for value in report.stages_ms.values())
    assert report.decode_tokens_s == pytest.approx(1e3 / report.stages_ms["decode a token"])


def test_a_table_on_a_video(tiny: Any, sonoedge: Any, write_video: Callable[..., Path]) -> None:
    video = write_video(frames=4)
    ran = sonoedge("bench", tiny.bundle, "--source", video, "--seconds", 0.8)
    assert ran.status == 0, ran.err
    assert "capture to wire, p99" in ran.out
    assert "tokens a second" in ran.out


def test_a_source_that_is_not_there_is_refused(tiny: Any, sonoedge: Any, tmp_path: Path) -> None:
    ran = sonoedge("bench", tiny.bundle, "--source", tmp_path / "nothing.avi", "--seconds", 0.5)
    assert ran.status == 2
    assert "nothing.avi does not exist" in ran.err


class Camera:
    """A device that only one program at a time can hold, and that lets go when its iteration ends, as live feeds do."""

    name, fps, state = "camera", 30.0, "live"
    held = 0

    def __init__(self, frames: int) -> None:
        if Camera.held:
            raise SonoEdgeError("the camera is in use")
        Camera.held += 1
        self._frames, self._closed = frames, False

    def __iter__(self) -> Iterator[Frame]:
        for sequence in itertools.takewhile(lambda n: not self._closed and n < self._frames, itertools.count()):
            yield Frame(MemorySource()._images[0], sequence, time.monotonic_ns(), None, "camera")
        Camera.held -= 1

    def close(self) -> None:
        self._closed = True


def test_a_camera_is_let_go_before_it_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "open_source", lambda _spec: Camera(5))
    assert bench._first_frame("0").source == "camera"
    assert Camera.held == 0
    bench._open("0").close()
    Camera.held = 0


def test_a_source_without_frames_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "open_source", lambda _spec: Camera(0))
    with pytest.raises(SonoEdgeError, match="camera gives no frame"):
        bench._first_frame("0")


def test_frames_made_in_memory_keep_their_pace() -> None:
    source = MemorySource(fps=100.0)
    began = time.monotonic()
    frames = list(itertools.islice(source, 20))
    assert [frame.sequence for frame in frames] == list(range(20))
    assert 0.18 < time.monotonic() - began < 2
    assert source.state == "live"
