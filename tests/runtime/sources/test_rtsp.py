"""RTSP over loopback, from the server that Debian's GStreamer has."""

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Context = Callable[..., contextlib.AbstractContextManager[Any]]  # the fixtures `watched` and `child`

DEBIAN_PYTHON = "/usr/bin/python3"  # the one that has Debian's GStreamer bindings

RTSP_SERVER = """
import sys
import gi
gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer
Gst.init(None)
server = GstRtspServer.RTSPServer()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
factory = GstRtspServer.RTSPMediaFactory()
factory.set_launch(
    "( videotestsrc is-live=true pattern=white ! video/x-raw,format=I420,width=160,height=120,framerate=30/1"
    " ! jpegenc ! rtpjpegpay name=pay0 pt=26 )"
)
server.get_mount_points().add_factory("/probe", factory)
server.attach(None)
print("ready", flush=True)
GLib.MainLoop().run()
"""


def rtsp_server_is_installed() -> bool:
    check = RTSP_SERVER.partition("Gst.init")[0]
    if not Path(DEBIAN_PYTHON).exists():
        return False
    return subprocess.run([DEBIAN_PYTHON, "-c", check], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(
    not rtsp_server_is_installed(),
    reason="needs Debian's python3-gi, gir1.2-gst-rtsp-server-1.0 and gstreamer1.0-plugins-good",
)
def test_rtsp_gives_the_senders_times_and_recovers(watched: Context, child: Context, port: int) -> None:
    url = f"rtsp://127.0.0.1:{port}/probe"
    command = (DEBIAN_PYTHON, "-c", RTSP_SERVER, str(port))
    with child(*command) as server, watched(url) as watch:
        watch.until_frames(60)
        assert watch.says()[0] == "live"
        assert watch.source.fps == pytest.approx(30)
        settled = watch.frames[40:60]  # those that OpenCV held back while it connected came at once
        gaps_ms = np.diff([frame.captured_ns for frame in settled]) / 1e6
        print(f"gaps of the sender's times {gaps_ms.min():.1f} to {gaps_ms.max():.1f} ms")
        assert gaps_ms.mean() == pytest.approx(1000 / 30, abs=2)
        assert all(frame.captured_ns <= at for frame, at in zip(watch.frames, watch.arrived_ns, strict=False))
        assert settled[0].image.shape == (120, 160, 3)
        assert settled[0].image.min() > 225  # jpegenc leaves video range as it is
        server.kill()
        lost = watch.until_state("lost", 10)
        with child(*command):
            back = watch.until_frames(1, 20)
    print(f"lost after {lost:.1f} s, back {back:.1f} s after the new server was ready")
    assert back < 10
