"""What the page shows: the newest of everything, told to any number of pages, none of which can fall behind."""

import asyncio
from collections import deque

import msgspec

from sonoedge.runtime.hints import Text
from sonoedge.runtime.protocol import Telemetry
from sonoedge.runtime.sources import SourceState
from sonoedge.runtime.viewer.clock import now_ms

HISTORY_MS = 180_000.0
HISTORY_HINTS = 6000
THIN_MS = 1000.0  # of a hint that goes on saying the same, one such in the history is enough
STATES = 200


class ServerSeen(msgspec.Struct, frozen=True, tag="server"):
    """Whether the server is there, and what it said of itself."""

    heard: bool
    detail: str | None = None
    model: str | None = None
    intended_use: str | None = None


class SourceSeen(msgspec.Struct, frozen=True, tag="source"):
    """What the source is doing, and since when."""

    state: SourceState
    name: str
    detail: str | None
    since_ms: float


class HintSeen(msgspec.Struct, frozen=True, tag="hint"):
    """What a hint says: words and probability, or a reason; a guess that was not said does not reach the page."""

    hint: str
    text: Text | None
    probability: float | None
    reason: str | None
    set: tuple[Text, ...]  # two or more, or none
    coverage: float | None
    frame: int
    captured_ms: float
    valid_ms: int


class Names(msgspec.Struct, frozen=True, tag="schema"):
    """The names of the hints, in order."""

    hints: tuple[str, ...]


class Counts(msgspec.Struct, frozen=True, tag="counts"):
    """The server's counters."""

    telemetry: Telemetry


class History(msgspec.Struct, frozen=True, tag="history"):
    """What was said in the last minutes: (hint, captured_ms, words) and (state, since_ms), oldest first."""

    hints: tuple[tuple[str, float, Text | None], ...]
    states: tuple[tuple[SourceState, float], ...]


Event = ServerSeen | SourceSeen | HintSeen | Names | Counts | History


class Board:
    """The newest event of each topic with a version; asyncio only, on one loop."""

    def __init__(self) -> None:
        self._version = 0
        self._newest: dict[str, tuple[int, Event]] = {}
        self._changed = asyncio.Event()
        self._hints: deque[tuple[str, float, Text | None]] = deque(maxlen=HISTORY_HINTS)
        self._states: deque[tuple[SourceState, float]] = deque(maxlen=STATES)
        self._kept: dict[str, tuple[float, Text | None]] = {}  # of each hint, the newest in the history

    def put(self, event: Event, topic: str | None = None) -> None:
        """Show an event in place of the one before it, of the same topic or else of the same type."""
        topic = topic or type(event).__name__
        if topic in self._newest and self._newest[topic][1] == event:
            return
        self._version += 1
        self._newest[topic] = (self._version, event)
        self._changed.set()
        self._changed = asyncio.Event()

    def put_hint(self, hint: HintSeen) -> None:
        """Show a hint and remember it for the timeline."""
        self.put(hint, f"hint {hint.hint}")
        since_ms, text = self._kept.get(hint.hint, (0.0, None))
        if hint.hint not in self._kept or text != hint.text or hint.captured_ms - since_ms >= THIN_MS:
            self._kept[hint.hint] = (hint.captured_ms, hint.text)
            self._hints.append((hint.hint, hint.captured_ms, hint.text))

    def put_source(self, state: SourceState, name: str, detail: str | None) -> None:
        """Show what the source is doing; `since_ms` changes with the state only."""
        if not self._states or self._states[-1][0] != state:
            self._states.append((state, now_ms()))
        self.put(SourceSeen(state, name, detail, self._states[-1][1]))

    @property
    def server(self) -> ServerSeen | None:
        """What was last shown of the server."""
        found = self._newest.get(ServerSeen.__name__)
        return found[1] if found is not None and isinstance(found[1], ServerSeen) else None

    def history(self) -> History:
        """Return what a new page needs for its timeline."""
        since = now_ms() - HISTORY_MS
        return History(tuple(hint for hint in self._hints if hint[1] >= since), tuple(self._states))

    def newer(self, version: int) -> tuple[int, list[Event]]:
        """Return the events since `version`, the oldest first, and the version they lead to."""
        newer = sorted((item for item in self._newest.values() if item[0] > version), key=lambda item: item[0])
        return self._version, [event for _, event in newer]

    async def changed(self, version: int, timeout_s: float) -> None:
        """Wait until there is something newer than `version`, or the time is over."""
        if self._version > version:
            return
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except asyncio.TimeoutError:  # the name that Python 3.10 has
            return
