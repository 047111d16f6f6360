"""One evaluation from start to end: each system answers the same cases in turn, then all are scored together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from sonoedge.calibration.check_data import DataCheck, check_cases
from sonoedge.calibration.pool import phantom_pool
from sonoedge.calibration.scores import ScoredFrames, score_pool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.evaluation.answers import Answered, answer_all
from sonoedge.export.evaluation.cases import Cases, FileCases, PhantomCases
from sonoedge.export.evaluation.hints import with_hints
from sonoedge.export.evaluation.result import Evaluation, System
from sonoedge.export.evaluation.score import Scored, score
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

PHANTOMS = "phantoms"
FIRST_FRAME_SEED = 9_000_000  # far from the seeds of every recipe: no frame here was trained or calibrated on

Open = Callable[[Path], tuple[Session, Tokenizer]]


class Outcome(msgspec.Struct, frozen=True):
    """An evaluation, the answers it stands on, and the cases with their pictures for as long as they can be read."""

    evaluation: Evaluation
    scored: Scored
    cases: Cases


def evaluate(systems: Sequence[System], data: str, limit: int, open_system: Open, work: Path) -> Outcome:
    """Let every system answer, at most `limit` cases, and compare each with the first.

    data: "phantoms", a conversation file or a labelled folder. work: an empty folder for phantoms. Raises SonoEdgeError
    for data that no case can be read from, for a model that cannot be opened, and for a question that does not fit.
    """
    if data == PHANTOMS:
        return _on_phantoms(systems, limit, open_system, work)
    cases = FileCases(Path(data), limit)
    check = check_cases({data: cases.conversations})
    if check.problems and not check.usable:
        raise SonoEdgeError(
            f"--data {data}: {check.summary}: `sonoedge check-data {data}` lists them, then mend or remove them"
        )
    answered = []
    for system in systems:
        session, tokenizer = open_system(Path(system.path))
        try:
            answered.append(answer_all(session, tokenizer, cases, f"{system.name} answers"))
        finally:
            session.close()
    scored = score(answered, [system.name for system in systems])
    notes = _notes(answered, [system.name for system in systems], cases.left_out)
    return Outcome(_told(systems, data, cases, scored, (*notes, f"data: {check.summary}"), check=check), scored, cases)


def _on_phantoms(systems: Sequence[System], frames: int, open_system: Open, work: Path) -> Outcome:
    schema = load_schema()
    answered: list[Answered] = []
    hints: list[ScoredFrames] = []
    for index, system in enumerate(systems):
        session, tokenizer = open_system(Path(system.path))
        try:
            # Rendered at the model's own resolution, which systems need not share.
            folder = work / f"{session.image.max_pixels}-{session.image.patch_size}-{session.image.min_pixels}"
            pool = phantom_pool(folder, frames, first_seed=FIRST_FRAME_SEED, spec=session.image)
            if not index:
                cases = PhantomCases(pool)
            hints.append(score_pool(session, tokenizer, pool, f"{system.name} scores hints", schema))
            own = answer_all(session, tokenizer, PhantomCases(pool), f"{system.name} answers")
            answered.append(with_hints(own, hints[-1], schema))
        finally:
            session.close()
    scored = score(answered, [system.name for system in systems])
    notes = _notes(answered, [system.name for system in systems], 0)
    told = _told(systems, PHANTOMS, cases, scored, notes)
    told = msgspec.structs.replace(told, accuracy=hints[0].accuracy(), strata=hints[0].strata())
    return Outcome(told, scored, cases)


def _told(
    systems: Sequence[System],
    data: str,
    cases: Cases,
    scored: Scored,
    notes: Sequence[str],
    check: DataCheck | None = None,
) -> Evaluation:
    return Evaluation(
        frames=len(cases),
        data=data,
        systems=tuple(systems),
        questions=len(scored.answers),
        scores=scored.scores,
        classes=scored.classes,
        confusion=scored.confusion,
        worst=scored.worst,
        notes=tuple(notes),
        check=check,
    )


def _notes(answered: Sequence[Answered], names: Sequence[str], left_out: int) -> tuple[str, ...]:
    """What must be known to read the scores rightly."""
    notes = ["prompts are the runtime's own, with its English system turn; a file's system turns are not used"]
    if left_out:
        notes.append(f"{left_out:,} cases beyond the limit were not asked")
    for name, system in zip(names, answered, strict=True):
        said = [one for answers in system.said for one in answers]
        cut, short = sum(one.finish == "length" for one in said), sum(one.turns_left_out > 0 for one in said)
        if cut:
            notes.append(f"{name}: {cut:,} answers were cut off at the longest length or the end of the context")
        if short:
            notes.append(f"{name}: {short:,} questions were asked without the earliest turns, which did not fit")
    return tuple(notes)
