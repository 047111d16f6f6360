"""The newest latencies and their percentiles, in bounded memory."""

import numpy as np


class LatencyWindow:
    """Keeps the last `size` samples; written and read by one thread."""

    def __init__(self, size: int = 4096) -> None:
        self._samples_ms = np.empty(size, np.float64)
        self._count = 0

    def record(self, latency_ms: float) -> None:
        """Add a sample in place of the oldest."""
        self._samples_ms[self._count % len(self._samples_ms)] = latency_ms
        self._count += 1

    def percentiles(self) -> tuple[float, float, float] | tuple[None, None, None]:
        """Return p50, p95 and p99 in milliseconds, None without samples."""
        if not self._count:
            return None, None, None
        kept = self._samples_ms[: self._count]
        p50, p95, p99 = np.percentile(kept, (50, 95, 99))
        return float(p50), float(p95), float(p99)
