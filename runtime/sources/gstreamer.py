"""A GStreamer pipeline as a feed: `gst-launch-1.0` runs as a child, and its frames come through a pipe."""

import contextlib
import fcntl
import os
import select
import shlex
import shutil
import subprocess
import threading
import time
from collections import deque

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources.feed import LiveFeed, LostError, Picture, without_password
from sonoedge.runtime.sources.gdp import (
    BUFFER,
    CAPS,
    HEADER_BYTES,
    GdpError,
    Layout,
    Packet,
    read_caps,
    read_header,
    read_picture,
)
from sonoedge.runtime.sources.stamps import StampMapper

PREFIX = "gst:"
PROGRAM = "gst-launch-1.0"
START_S = 5.0  # a pipeline that cannot work ends within this
END_S = 2.0  # for the child to end by itself
PIPE_BYTES = 2**20
LINES_KEPT = 20  # of what the child says

# Frames of a file are held to their time, those of a device must not wait for theirs: so everything is due 0.2 s early.
_TAIL = "! videoconvert ! video/x-raw,format=RGB ! gdppay ! fdsink sync=true ts-offset=-200000000 fd={fd}"


class GStreamerSource(LiveFeed):
    """The frames of a launch string that ends in raw video, such as `gst: v4l2src device=/dev/video0`.

    The launch string is split like a command line and given to the child as arguments; no shell reads it.
    """

    def __init__(self, spec: str, *, once: bool = False, fps: float | None = None) -> None:
        """Start the pipeline; raises SonoEdgeError when GStreamer is not installed or the pipeline ends at once."""
        super().__init__(spec, once=once, fps=fps)
        program = shutil.which(PROGRAM)
        if program is None:
            raise SonoEdgeError(
                f"{PROGRAM} is not installed: `apt install gstreamer1.0-tools gstreamer1.0-plugins-base "
                "gstreamer1.0-plugins-bad` (Debian's names)"
            )
        try:
            launch = shlex.split(spec.removeprefix(PREFIX))
        except ValueError as error:
            raise SonoEdgeError(f"the pipeline {self.name!r} cannot be split ({error}): close its quotes") from error
        if not launch:
            raise SonoEdgeError(
                f"the pipeline {self.name!r} is empty: write one like `gst: v4l2src device=/dev/video0`"
            )
        self._program, self._launch, self._states_fps = program, launch, fps is None
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._first: Picture | None = None  # that came while the pipeline was tried
        self.connect()
        self.linked()
        select.select([self._pipe], [], [], START_S)
        try:
            self._first = self._advance()
        except LostError as error:
            self.disconnect()
            raise SonoEdgeError(
                f"the pipeline {self.name!r} does not start ({error}): try it with {PROGRAM}"
            ) from error

    def connect(self) -> None:
        """Start the child."""
        self._pipe, writing = os.pipe()
        with contextlib.suppress(OSError):  # the system may allow less
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self._pipe, False)
        try:
            self._child = subprocess.Popen(
                [self._program, "-q", *self._launch, *_TAIL.format(fd=writing).split()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[writing],
                env={**os.environ, "LC_ALL": "C", "GST_DEBUG_NO_COLOR": "1"},
                start_new_session=True,  # Ctrl-C is for the server, which ends the child
            )
        except OSError as error:
            os.close(self._pipe)
            raise LostError(f"{PROGRAM} cannot be started ({error})") from error
        finally:
            os.close(writing)
        self._said: deque[str] = deque(maxlen=LINES_KEPT)
        self._listener = threading.Thread(target=self._listen, args=(self._child, self._said), daemon=True)
        self._listener.start()
        self._stamps = StampMapper()
        self._layout: Layout | None = None
        self._packet: Packet | None = None  # whose payload is being read
        self._buffer, self._filled = bytearray(HEADER_BYTES), 0

    def receive(self, wait_s: float) -> Picture | None:
        """Read what the child has written, up to one whole frame."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        select.select([self._pipe], [], [], wait_s)
        return self._advance()

    def disconnect(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is None:
            return
        os.close(self._pipe)  # a child that writes ends by this alone
        child.terminate()
        try:
            child.wait(END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self._listener.join(END_S)
        assert child.stdout is not None
        child.stdout.close()

    def _advance(self) -> Picture | None:
        while True:
            while self._filled < len(self._buffer):
                try:
                    count = os.readv(self._pipe, [memoryview(self._buffer)[self._filled :]])
                except BlockingIOError:
                    return None
                if count == 0:
                    raise LostError(self._ending())
                self._filled += count
            try:
                picture = self._take()
            except GdpError as error:
                raise LostError(str(error)) from error
            if picture is not None:
                return picture

    def _take(self) -> Picture | None:
        """Use the bytes that are whole now, and make room for the next."""
        whole, packet = self._buffer, self._packet
        picture = None
        if packet is None:
            self._packet = read_header(bytes(whole))
            self._buffer = bytearray(self._packet.length)
        else:
            self._packet, self._buffer = None, bytearray(HEADER_BYTES)
            if packet.type == CAPS:
                self._layout = read_caps(bytes(whole))
                if self._states_fps and self._layout.fps is not None:
                    self.fps = self._layout.fps
            elif packet.type == BUFFER:
                if self._layout is None:
                    raise GdpError("a frame came before the description of its size")
                arrived_ns = time.monotonic_ns()
                stamp_ns = packet.stamp_ns
                captured_ns = arrived_ns if stamp_ns is None else self._stamps.captured_ns(stamp_ns, arrived_ns)
                picture = Picture(read_picture(whole, self._layout), captured_ns)
        self._filled = 0
        return picture

    def _ending(self) -> str:
        """What the child said, or that its pipeline came to its end."""
        assert self._child is not None
        try:
            status = self._child.wait(END_S)
        except subprocess.TimeoutExpired:
            return f"{PROGRAM} closed its output"
        self._listener.join(END_S)
        if status == 0:
            return "the pipeline came to its end"
        told = next((line for line in self._said if "ERROR" in line or "erroneous" in line), None)
        told = told or (self._said[-1] if self._said else f"ended with status {status}")
        need = "; it is in Debian's gstreamer1.0-plugins-bad" if 'no element "gdppay"' in told else ""
        return f"{PROGRAM}: {told}{need}"

    @staticmethod
    def _listen(child: subprocess.Popen[bytes], said: deque[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            if text := line.decode(errors="replace").strip():
                said.append(without_password(text[:500]))
