"""GStreamer pipelines as child processes: frames, sizes, refusals, and what happens when they die or hang."""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources import open_source
from sonoedge.runtime.sources.gstreamer import GStreamerSource

Context = Callable[..., contextlib.AbstractContextManager[Any]]  # the fixtures `watched` and `child`

needs_gstreamer = pytest.mark.skipif(
    shutil.which("gst-launch-1.0") is None
    or subprocess.run(["gst-inspect-1.0", "--exists", "gdppay"], check=False).returncode != 0,
    reason="needs Debian's gstreamer1.0-tools, gstreamer1.0-plugins-base and gstreamer1.0-plugins-bad",
)


PATTERN = "videotestsrc is-live=true pattern=white ! video/x-raw,width=66,height=40,framerate=25/1"


@needs_gstreamer
def test_a_pipeline_plays_to_its_end_at_its_own_rate() -> None:
    source = open_source(
        "gst: videotestsrc num-buffers=30 pattern=red ! video/x-raw,width=322,height=240,framerate=30/1", once=True
    )
    assert source.fps == 30
    began = time.monotonic()
    taken = list(source)
    assert [frame.sequence for frame in taken] == list(range(30))
    assert taken[0].image.shape == (240, 322, 3)  # its rows are filled up to four bytes in the pipe
    assert np.abs(taken[0].image.astype(int) - [255, 0, 0]).max() <= 3
    assert 0.6 < time.monotonic() - began < 3  # a second of frames, the first 0.2 s of them at once
    stamps_ms = np.diff([frame.captured_ns for frame in taken[10:]]) / 1e6
    assert stamps_ms.mean() == pytest.approx(1000 / 30, abs=3)
    assert source.state == "ended"


@needs_gstreamer
def test_a_pipeline_that_changes_its_size() -> None:
    size = "videotestsrc num-buffers={} ! video/x-raw,width={},height={},framerate=30/1 ! c."
    source = open_source(f"gst: concat name=c {size.format(4, 64, 48)} {size.format(3, 32, 24)} c.", once=True)
    shapes = []
    for frame in source:
        shapes.append(frame.image.shape)
        told = source.detail
    assert shapes == [(48, 64, 3)] * 4 + [(24, 32, 3)] * 3
    assert told == "the frames changed from 64 x 48 to 32 x 24 pixels"


@needs_gstreamer
def test_a_killed_pipeline_is_started_again_and_ends_with_the_source(watched: Context) -> None:
    with watched(f"gst: {PATTERN}") as watch:
        watch.until_frames(5)
        first = watch.source._child
        first.kill()
        count = len(watch.frames)
        watch.until(lambda: watch.source._child not in (first, None), 5)
        took = watch.until_frames(1)
        watch.until_state("live", 1)
        second = watch.source._child
        assert len(watch.frames) > count
    print(f"frames {took * 1000:.0f} ms after the new pipeline")
    assert took < 3
    assert first.returncode == -9
    assert second.returncode is not None


@needs_gstreamer
def test_a_pipeline_that_hangs_stalls_and_is_replaced(monkeypatch: pytest.MonkeyPatch, watched: Context) -> None:
    monkeypatch.setattr(GStreamerSource, "silence_s", 3.0)
    with watched(f"gst: {PATTERN}") as watch:
        watch.until_frames(5)
        hung = watch.source._child
        hung.send_signal(signal.SIGSTOP)
        assert watch.until_state("stalled", 5) > 1.5
        assert re.fullmatch(r"connected but no frames for 2\.\d s", watch.says()[1] or "")
        back = watch.until_state("live", 10)
    print(f"frames {back:.1f} s after it stalled, of which 1 s is patience and 2 s are for the old one to end")
    assert hung.returncode == -signal.SIGKILL
    assert back < 6


@needs_gstreamer
def test_the_pipeline_ends_when_the_server_is_killed(child: Context) -> None:
    code = (
        "import sys; from sonoedge.runtime.sources import open_source as o\ns = o(sys.argv[1]); it = iter(s); next(it)"
    )
    code += "\nprint('ready', flush=True); print(s._child.pid, flush=True)\nfor _ in it: pass"
    with child(sys.executable, "-c", code, f"gst: {PATTERN}") as server:
        assert server.stdout is not None
        pipeline = Path("/proc") / server.stdout.readline().strip()
        assert pipeline.exists()
    began = time.monotonic()
    while pipeline.exists() and "zombie" not in (pipeline / "status").read_text():  # nobody may be there to reap it
        assert time.monotonic() - began < 5
        time.sleep(0.05)


@needs_gstreamer
@pytest.mark.parametrize(
    ("launch", "told"),
    [
        ("nosuchelement", 'no element "nosuchelement"'),
        ("filesrc location=/nowhere ! decodebin", "does not start"),
        ("videotestsrc ! 'video/x-raw", "close its quotes"),
        ("", "is empty"),
    ],
)
def test_a_pipeline_that_cannot_work_is_refused_with_its_words(launch: str, told: str) -> None:
    with pytest.raises(SonoEdgeError, match=told) as refusal:
        open_source(f"gst: {launch}")
    assert "\n" not in str(refusal.value)


@needs_gstreamer
def test_no_shell_reads_the_pipeline(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError):
        open_source(f"gst: nosuch; touch {tmp_path}/here $(touch {tmp_path}/there)")
    assert list(tmp_path.iterdir()) == []


def test_without_gstreamer_its_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SonoEdgeError, match=r"apt install gstreamer1\.0-tools"):
        open_source("gst: videotestsrc")
