"""Hints on their way out: as messages on the wire, as records in the audit log, and as counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sonoedge.runtime.counters import Counters
from sonoedge.runtime.hint_engine import HintResult
from sonoedge.runtime.hint_records import HintRecords
from sonoedge.runtime.model import Model
from sonoedge.runtime.protocol import Hint
from sonoedge.runtime.sight import Sight
from sonoedge.runtime.wire import Wire


class Publisher:
    """Says what the worker found; on the I/O thread only."""

    def __init__(
        self,
        model: Model,
        wire: Wire,
        counters: Counters,
        record: Callable[[str, Mapping[str, Any]], None],
        keep: Callable[[Sight], Mapping[str, str]],
    ) -> None:
        self._model, self._wire, self._counters, self._keep = model, wire, counters, keep
        self._records = HintRecords(record)

    def publish(self, sight: Sight, results: Sequence[HintResult], stages_ms: Mapping[str, float]) -> None:
        """Say the hints about a frame, with where its time went."""
        self.say(sight, results)
        self._counters.count_frame(sight.age_ms, stages_ms, gated=sight.poor is not None)

    def say(self, sight: Sight, results: Sequence[HintResult]) -> None:
        """Say hints about a frame that has been counted already, or is being so."""
        hints = [self._hint(sight, result) for result in results]
        for hint in hints:
            self._wire.publish(hint)
        self._records.say(hints, lambda: self._keep(sight))
        self._counters.count_hints(results)

    def close(self) -> None:
        """Record until when the last hints were said."""
        self._records.close()

    def _hint(self, sight: Sight, result: HintResult) -> Hint:
        return Hint(
            hint=result.hint,
            answer=result.answer,
            text=result.text,
            probability=result.probability,
            abstain=result.abstain,
            reason=result.reason,
            frame=sight.frame.sequence,
            age_ms=sight.age_ms,
            model=self._model.id,
            intended_use=self._model.intended_use,
            captured_ns=sight.frame.captured_ns,
            source=sight.frame.source,
            candidates=result.candidates,
            set=result.set,
            coverage=result.coverage,
            valid_ms=result.valid_ms,
        )
