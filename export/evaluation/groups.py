"""The groups of questions that are scored apart: by region and without it, by kind, language and image quality."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from sonoedge.calibration.questions import Question
from sonoedge.export.evaluation.answers import Answered, Said, Seen
from sonoedge.export.evaluation.result import ALL

QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")
FEWEST_FOR_QUARTERS = 8  # cases: with fewer, a quarter is one picture


class Asked(msgspec.Struct, frozen=True):
    """One question, its case, and the answer of every system."""

    owner: int
    case: Seen
    question: Question
    said: tuple[Said, ...]
    groups: tuple[tuple[str, str], ...]  # dimension and value


def flatten(answered: Sequence[Answered]) -> tuple[Asked, ...]:
    """Every question of the cases, which are the same for all systems, in which groups it is."""
    cases = answered[0].cases
    regions = sorted({case.region for case in cases if case.region is not None})
    quarters = _quarters(cases)
    rows = []
    for owner, case in enumerate(cases):
        known = [(ALL, ALL)]
        if case.region is not None and len(regions) > 1:
            known.append(("region", case.region))
            known += [("outside region", region) for region in regions if region != case.region]
        if case.quality is not None:
            known.append(("quality", case.quality))
        known += quarters[owner]
        for number, question in enumerate(case.questions):
            own = (*known, ("kind", question.kind), ("language", question.language))
            said = tuple(system.said[owner][number] for system in answered)
            rows.append(Asked(owner, case, question, said, own))
    return tuple(rows)


def _quarters(cases: Sequence[Seen]) -> list[list[tuple[str, str]]]:
    """The quarter of each case by what its first picture measures, where quality is not known otherwise."""
    found: list[list[tuple[str, str]]] = [[] for _ in cases]
    if len(cases) < FEWEST_FOR_QUARTERS or all(case.quality is not None for case in cases):
        return found
    for name in ("contrast", "sharpness"):
        values = np.array([getattr(case, name) for case in cases])
        edges = np.quantile(values, [0.25, 0.5, 0.75])
        for groups, quarter in zip(found, np.searchsorted(edges, values, side="left"), strict=True):
            groups.append((name, QUARTERS[int(quarter)]))
    return found
