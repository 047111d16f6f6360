"""Hints over time: averaged over the last frames, changed only by a clear lead, forgotten when the exam moves on."""

import math
from collections.abc import Mapping

import msgspec

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.hint_engine import LOW_CONFIDENCE, STALE_FRAME, UNSEEN, HintResult
from sonoedge.runtime.hints import HintSchema, HintSpec

TIME_CONSTANT_MS = 300.0  # a frame of this age weighs 1/e of the newest
MARGIN = 0.15  # of probability, by which a new answer must lead the one that stands
EXAM = "region"  # the hint whose change begins another exam
LEAST = 1e-9  # probability whose logarithm is averaged
# Averaged share of unseen frames: above the one all fall silent, under the other they speak.
STRANGE, FAMILIAR = 0.5, 0.25


class _Track(msgspec.Struct, frozen=True):
    """What is remembered of one hint."""

    logs: dict[str, float]  # mean log-probability of every candidate
    captured_ns: int  # of the last frame that counted
    standing: str  # the answer that stands
    last: HintResult


class _Strangeness(msgspec.Struct, frozen=True):
    """How many of the last frames were of an unseen kind, and whether that silences everything."""

    share: float
    captured_ns: int | None
    silent: bool

    def after(self, unseen: bool, captured_ns: int, time_constant_ns: float) -> "_Strangeness":
        """Return the state after one more frame; the first one decides alone."""
        kept = 0.0
        if self.captured_ns is not None:
            kept = math.exp(-max(0, captured_ns - self.captured_ns) / time_constant_ns)
        share = kept * self.share + (1 - kept) * unseen
        return _Strangeness(share, captured_ns, share > (FAMILIAR if self.silent else STRANGE))


class HintSmoother:
    """Smooths the hints of one feed; it keeps no clock: times come with the frames."""

    def __init__(
        self, schema: HintSchema, *, time_constant_ms: float = TIME_CONSTANT_MS, margin: float = MARGIN
    ) -> None:
        self._schema = schema
        self._time_constant_ns = time_constant_ms * 1e6
        self._margin = margin
        self._tracks: dict[str, _Track] = {}
        self._source: str | None = None
        self._strange = _Strangeness(0.0, None, silent=False)

    def reset(self) -> None:
        """Forget everything, as at the start of an exam."""
        self._tracks.clear()
        self._strange = _Strangeness(0.0, None, silent=False)

    def update(self, frame: Frame, results: list[HintResult], now_ns: int | None = None) -> list[HintResult]:
        """Return the hints about `frame` as they should be shown, in the schema's order.

        Probabilities are averaged geometrically with a time constant; an answer gives way only to one that leads by
        the margin; a hint is forgotten after a gap as long as it is valid, and all are when the region changes. Frames
        of an unseen kind and poor ones do not count; a few unseen ones among known ones do not silence what stands,
        a poor one does. Sets and their coverage stay those of the newest frame alone. now_ns: the clock of
        `captured_ns`; an answer about a frame older than its `valid_ms` abstains (None: the frame is new).
        """
        if frame.source != self._source:
            self._source = frame.source
            self.reset()
        unseen = any(result.reason == UNSEEN for result in results)
        if results and (unseen or all(result.candidates for result in results)):
            self._strange = self._strange.after(unseen, frame.captured_ns, self._time_constant_ns)
        given = {result.hint: result for result in results}
        smoothed: dict[str, HintResult] = {}
        for hint in self._schema.hints:
            before = self._alive(hint, frame.captured_ns)
            condition = hint.ask_when
            if condition and (condition.hint not in smoothed or smoothed[condition.hint].answer != condition.answer):
                self._tracks.pop(hint.name, None)
                continue
            result = given.get(hint.name)
            if result is None:  # not asked about this frame: what was said stands until it is stale
                if before is not None and condition is not None:
                    smoothed[hint.name] = before.last
                continue
            if result.reason == UNSEEN and before is not None and not self._strange.silent:
                smoothed[hint.name] = before.last
                continue
            if result.abstain and result.reason != LOW_CONFIDENCE:
                smoothed[hint.name] = result
                continue
            if self._strange.silent:
                smoothed[hint.name] = msgspec.structs.replace(
                    result, answer=None, text=None, abstain=True, reason=UNSEEN, set=(), coverage=None
                )
                continue
            track = self._follow(before, result, frame.captured_ns)
            self._tracks[hint.name] = msgspec.structs.replace(track, last=_say(hint, track))
            smoothed[hint.name] = self._tracks[hint.name].last
            if hint.name == EXAM and before is not None and before.standing != track.standing:
                self._tracks = {EXAM: self._tracks[EXAM]}
        return [_in_time(result, frame.captured_ns, now_ns) for result in smoothed.values()]

    def expire(self, now_ns: int) -> list[HintResult]:
        """Return, once each, the hints whose last frame is older than `valid_ms`: they abstain as stale."""
        stale = []
        for hint in self._schema.hints:
            track = self._tracks.get(hint.name)
            if track is not None and now_ns - track.captured_ns > hint.valid_ms * 1_000_000:
                stale.append(_in_time(track.last, track.captured_ns, now_ns))
                del self._tracks[hint.name]
        return stale

    def _alive(self, hint: HintSpec, captured_ns: int) -> _Track | None:
        track = self._tracks.get(hint.name)
        if track is None or not 0 <= captured_ns - track.captured_ns <= hint.valid_ms * 1_000_000:
            self._tracks.pop(hint.name, None)
            return None
        return track

    def _follow(self, before: _Track | None, result: HintResult, captured_ns: int) -> _Track:
        logs = {name: math.log(max(share, LEAST)) for name, share in result.candidates.items()}
        if before is None or before.logs.keys() != logs.keys():
            return _Track(logs, captured_ns, max(logs, key=logs.__getitem__), result)
        kept = math.exp(-(captured_ns - before.captured_ns) / self._time_constant_ns)
        logs = {name: kept * before.logs[name] + (1 - kept) * value for name, value in logs.items()}
        shares = _shares(logs)
        best = max(shares, key=shares.__getitem__)
        changes = shares[best] - shares[before.standing] >= self._margin
        return _Track(logs, captured_ns, best if changes else before.standing, result)


def _say(hint: HintSpec, track: _Track) -> HintResult:
    shares = _shares(track.logs)
    probability = shares[track.standing]
    silent = probability < track.last.abstain_below
    text = next(candidate.text for candidate in hint.candidates if candidate.id == track.standing)
    return msgspec.structs.replace(
        track.last,
        answer=None if silent else track.standing,
        text=None if silent else text,
        probability=probability,
        abstain=silent,
        reason=LOW_CONFIDENCE if silent else None,
        candidates=shares,
    )


def _shares(logs: Mapping[str, float]) -> dict[str, float]:
    peak = max(logs.values())
    weights = {name: math.exp(value - peak) for name, value in logs.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _in_time(result: HintResult, captured_ns: int, now_ns: int | None) -> HintResult:
    if now_ns is None or now_ns - captured_ns <= result.valid_ms * 1_000_000:
        return result
    return msgspec.structs.replace(result, answer=None, text=None, abstain=True, reason=STALE_FRAME)
