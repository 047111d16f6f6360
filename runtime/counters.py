"""What the server counts about its frames, hints and answers; one thread writes and reads it."""

from collections.abc import Mapping, Sequence

from sonoedge.runtime.hint_engine import HintResult
from sonoedge.runtime.latency import LatencyWindow
from sonoedge.runtime.protocol import Percentiles, Telemetry
from sonoedge.runtime.slot import LatestFrameSlot
from sonoedge.runtime.system_files import resident_bytes


class Counters:
    """Counts since the start, and the newest latencies by stage."""

    def __init__(self, slot: LatestFrameSlot) -> None:
        self.hinted = self.failed = self.answered = 0
        self._slot = slot
        self._gated = self._hints = self._abstentions = 0
        self._latency = LatencyWindow()
        self._stages: dict[str, LatencyWindow] = {}

    @property
    def every_frame_is_told(self) -> bool:
        """Whether each frame that came has been hinted about, has failed or was replaced by a newer one."""
        return self.hinted + self.failed + self._slot.dropped == self._slot.received

    def count_hints(self, results: Sequence[HintResult]) -> None:
        """Count what was published."""
        self._hints += len(results)
        self._abstentions += sum(result.abstain for result in results)

    def count_frame(self, latency_ms: float, stages_ms: Mapping[str, float], *, gated: bool) -> None:
        """Count a frame whose hints are on the wire; what its stages do not account for was the way there."""
        self.hinted += 1
        self._gated += gated
        self._latency.record(latency_ms)
        for stage, stage_ms in {**stages_ms, "wire": latency_ms - sum(stages_ms.values())}.items():
            self._stages.setdefault(stage, LatencyWindow()).record(stage_ms)

    def telemetry(self) -> Telemetry:
        """Return the message that tells them."""
        p50, p95, p99 = self._latency.percentiles()
        return Telemetry(
            frames=self._slot.received,
            dropped=self._slot.dropped,
            hinted=self.hinted,
            failed=self.failed,
            hints=self._hints,
            questions=self.answered,
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            abstentions=self._abstentions,
            stages=self._stage_percentiles(),
            resident_bytes=resident_bytes(),
            gated=self._gated,
        )

    def _stage_percentiles(self) -> dict[str, Percentiles]:
        found: dict[str, Percentiles] = {}
        for stage, window in list(self._stages.items()):
            match window.percentiles():
                case (float(p50), float(p95), float(p99)):
                    found[stage] = Percentiles(p50, p95, p99)
        return found
