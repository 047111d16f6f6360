"""The learning-rate schedule that teacher and student share."""

from __future__ import annotations

import math


def warm_cosine(step: int, *, steps: int, warmup_steps: int) -> float:
    """The share of the peak rate at `step`: linear warm-up, then a cosine down to a fiftieth."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    through = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * through))
