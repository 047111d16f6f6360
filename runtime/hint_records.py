"""Hints in the audit log: recorded when they begin to say something, and again when they cease to, with the frames.

At 30 frames a second every single one would fill a log in an hour. What was said about a frame is read from the span
that holds it: a `hint` record gives the words in full, a `hint_until` record the frames that they were said about.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from sonoedge.runtime.protocol import Hint

SPAN_S = 10.0  # a killed process loses at most the end of a span so long; its beginning is recorded at once


class _Span(msgspec.Struct):
    """Frames about which one hint said the same."""

    first: Hint
    last: Hint
    frames: int
    least: float  # probability
    most: float


class HintRecords:
    """Records what hints say, from one thread."""

    def __init__(self, record: Callable[[str, Mapping[str, Any]], None]) -> None:
        """record: takes a kind and its fields."""
        self._record = record
        self._spans: dict[str, _Span] = {}

    def say(self, hints: Sequence[Hint], keep: Callable[[], Mapping[str, str]]) -> None:
        """Record the hints about one frame as far as they say anything new; `keep` then keeps it and says where."""
        said = {hint.hint for hint in hints}
        for name in [name for name in self._spans if name not in said]:
            self._end(name)
        for hint in hints:
            span = self._spans.get(hint.hint)
            if span is not None and not _goes_on(span, hint):
                self._end(hint.hint)
                span = None
            if span is None:
                self._record("hint", {**msgspec.structs.asdict(hint), **keep()})
                self._spans[hint.hint] = _Span(hint, hint, 1, hint.probability, hint.probability)
            else:
                span.last = hint
                span.frames += 1
                span.least, span.most = min(span.least, hint.probability), max(span.most, hint.probability)

    def close(self) -> None:
        """End every span."""
        for name in list(self._spans):
            self._end(name)

    def _end(self, name: str) -> None:
        span = self._spans.pop(name)
        about = {"hint": name, "answer": span.first.answer, "abstain": span.first.abstain, "reason": span.first.reason}
        frames = {"first_frame": span.first.frame, "last_frame": span.last.frame, "frames": span.frames}
        shares = {"least_probability": span.least, "most_probability": span.most}
        self._record("hint_until", {**about, **frames, **shares, "captured_ns": span.last.captured_ns})


def _goes_on(span: _Span, hint: Hint) -> bool:
    """Whether a hint says what its span says, soon enough."""
    same = _words(span.first) == _words(hint)
    return same and hint.captured_ns - span.first.captured_ns < SPAN_S * 1e9


def _words(hint: Hint) -> tuple[object, ...]:
    return hint.answer, hint.abstain, hint.reason, frozenset(hint.set), hint.source
