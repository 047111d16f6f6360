"""What every live feed shares: its named states, connecting again with growing pauses, sizes that change."""

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.sources import SourceState, silence

FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 8.0
POLL_S = 0.1  # how soon `close` is noticed
SILENCE_S = 10.0  # connected, but no frame for this long: connect anew, since a peer without power never says so
NOTE_S = 10.0  # how long `detail` tells of a change of size or of a frame that was left out
NOTE_GAP_S = 0.25
NOMINAL_FPS = 30.0  # for senders that state no rate; a live feed sets its own pace


class Picture(msgspec.Struct, frozen=True):
    """What a feed received: RGB [height, width, 3], when it was taken, how large its pixels are."""

    image: npt.NDArray[np.uint8]
    captured_ns: int
    spacing_mm: float | None = None


class LostError(Exception):
    """The connection is gone; its text is the feed's `detail`."""


def without_password(spec: str) -> str:
    """Leave the user and the password out of addresses: the names of feeds go into messages and logs."""
    return re.sub(r"(?<=://)[^/\s]*@", "", spec)


class LiveFeed(ABC):
    """A feed that sets its own pace. `state` and `detail` are true at the moment they are read, from any thread.

    A feed connects in its constructor, by `connect`, and raises SonoEdgeError when that fails.
    """

    silence_s = SILENCE_S

    def __init__(self, name: str, *, once: bool, fps: float | None) -> None:
        self.name = without_password(name)
        self.fps = fps or NOMINAL_FPS
        self._once = once
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._iterated = False  # by a thread that will disconnect at its end
        self._linked = False  # there is something to receive from
        self._phase: Literal["waiting", "connected", "live", "lost", "ended"] = "waiting"
        self._reason: str | None = None  # of the loss
        self._since_ns = self._linked_ns = time.monotonic_ns()  # frames are missing since; connected since
        self._note: tuple[int, str] | None = None  # when, what
        self._size: tuple[int, ...] | None = None

    @abstractmethod
    def connect(self) -> None:
        """Connect; raises LostError saying why that cannot be done now."""

    @abstractmethod
    def receive(self, wait_s: float) -> Picture | None:
        """Return the next picture; None when none came within about `wait_s`; raises LostError when cut off."""

    @abstractmethod
    def disconnect(self) -> None:
        """Release what `connect` holds; does nothing when not connected."""

    @property
    def state(self) -> SourceState:
        """What the feed is doing now."""
        phase = self._phase
        if phase == "connected" or phase == "live":  # mypy narrows by these two
            if silence.is_stalled(self._since_ns, self.fps):
                return "stalled"
            return "live" if phase == "live" else "waiting"
        return phase

    @property
    def detail(self) -> str | None:
        """What `state` means here, in words; None when there is nothing to add."""
        state = self.state
        if state == "stalled":
            return silence.describe(self._since_ns)
        if state == "lost":
            return self._reason
        note = self._note
        return note[1] if note is not None and time.monotonic_ns() - note[0] < NOTE_S * 1e9 else None

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames as they come, connecting again after a failure (unless `once`) until closed."""
        with self._lock:
            self._iterated = True
        sequence, pause_s = 0, FIRST_PAUSE_S
        try:
            while not self._stop.is_set():
                if not self._linked:
                    if self._stop.wait(pause_s):
                        break
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                    self._connect_again()
                    continue
                try:
                    picture = self.receive(POLL_S)
                except LostError as loss:
                    self._lose(str(loss))
                    if self._once:
                        break
                    continue
                if picture is None:
                    if (time.monotonic_ns() - max(self._since_ns, self._linked_ns)) / 1e9 > self.silence_s:
                        self.disconnect()
                        self._connect_again(silent=True)
                    continue
                pause_s = FIRST_PAUSE_S
                self._phase, self._since_ns = "live", time.monotonic_ns()
                self._compare_size(picture.image)
                yield Frame(picture.image, sequence, picture.captured_ns, picture.spacing_mm, self.name)
                sequence += 1
        finally:
            self.disconnect()
            self._linked, self._phase = False, "ended"

    def close(self) -> None:
        """End the iteration after the read that is under way; a feed that was never iterated is released at once."""
        self._stop.set()
        with self._lock:
            if not self._iterated:
                self.disconnect()
                self._phase = "ended"

    def tell(self, note: str) -> None:
        """Say something in `detail` for a while, unless something else was said just now: every change is recorded."""
        now_ns = time.monotonic_ns()
        if self._note is None or now_ns - self._note[0] > NOTE_GAP_S * 1e9:
            self._note = (now_ns, note)

    def linked(self) -> None:
        """The connection stands, and frames are awaited from now on."""
        self._linked, self._phase = True, "connected"
        self._since_ns = self._linked_ns = time.monotonic_ns()

    def _connect_again(self, *, silent: bool = False) -> None:
        """Connect; after mere silence the feed stays stalled for as long as no frame comes."""
        since_ns, phase = self._since_ns, self._phase
        try:
            self.connect()
        except LostError as loss:
            self._lose(str(loss))
            return
        self.linked()
        if silent:
            self._since_ns, self._phase = since_ns, phase

    def _lose(self, reason: str) -> None:
        self._reason = reason
        self._linked, self._phase = False, "lost"
        self.disconnect()  # may take its time

    def _compare_size(self, image: npt.NDArray[np.uint8]) -> None:
        size = image.shape[:2]
        if self._size not in (None, size):
            assert self._size is not None
            self.tell("the frames changed from {1} x {0} to {3} x {2} pixels".format(*self._size, *size))
        self._size = size
