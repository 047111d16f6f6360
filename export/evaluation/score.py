"""From answers to scores: every measure of every group, with its interval, and every system against the first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import msgspec
import numpy as np

from sonoedge.calibration.questions import Task
from sonoedge.export.evaluation.answers import Answered
from sonoedge.export.evaluation.groups import Asked, flatten
from sonoedge.export.evaluation.measures import (
    Measure,
    choice_measures,
    class_names,
    matches,
    open_measures,
    text_measures,
)
from sonoedge.export.evaluation.resampling import McNemar, Resampler, mcnemar
from sonoedge.export.evaluation.result import ALL, Answer, Confusion, Difference, Score
from sonoedge.export.fidelity.text_scores import text_statistics
from sonoedge.progress import track

MOST_CLASSES = 20  # options of more wordings are no classes: letters are counted instead
WORST_EACH = 4  # of every task


class Scored(msgspec.Struct, frozen=True):
    """All scores of a set of answers, and what is shown beside them."""

    scores: tuple[Score, ...]
    classes: tuple[str, ...]
    confusion: tuple[Confusion, ...]
    answers: tuple[Answer, ...]

    @property
    def worst(self) -> tuple[Answer, ...]:
        """The answers in which the first system fails worst, a few of every task."""
        ranked = sorted(self.answers, key=lambda answer: -answer.badness)
        failed = [answer for answer in ranked if answer.badness > 0 and answer.right[0] is not True]
        return tuple(answer for task in Task for answer in [a for a in failed if a.task is task][:WORST_EACH])


def score(answered: Sequence[Answered], names: Sequence[str]) -> Scored:
    """Score the answers of systems called `names` to the same cases, each against the first."""
    rows = flatten(answered)
    classes = _classes(rows)
    scores: list[Score] = []
    subsets = _subsets(rows)
    with track("score and resample", len(subsets)) as advance:
        for (task, language), subset in subsets.items():
            for group in dict.fromkeys(group for row in subset for group in row.groups):
                members = [row for row in subset if group in row.groups]
                if group[0] in ("kind", "language") and len(members) == len(subset):
                    continue  # all there is: nothing apart
                scores += _scores(members, task, language, group, classes)
            advance(1)
    return Scored(tuple(scores), classes, _confusion(rows, classes, names), tuple(map(_answer, rows)))


def _subsets(rows: Sequence[Asked]) -> dict[tuple[Task, str | None], list[Asked]]:
    """The questions whose scores can be taken together: texts by language, since tokens differ."""

    def key(row: Asked) -> tuple[int, str, bool]:
        text = row.question.task is Task.REPORT
        return list(Task).index(row.question.task), row.question.language if text else "", not row.question.candidates

    return {
        (list(Task)[index], language or ("" if is_open else None)): list(found)
        for (index, language, is_open), found in groupby(sorted(rows, key=key), key=key)
    }


def _scores(
    members: Sequence[Asked], task: Task, language: str | None, group: tuple[str, str], classes: Sequence[str]
) -> list[Score]:
    asked = [row.question for row in members]
    measured: list[tuple[Measure, ...]] = []
    for system in range(len(members[0].said)):
        said = [row.said[system] for row in members]
        if task is Task.REPORT:
            assert language is not None
            measured.append(text_measures(asked, said, language))
        elif asked[0].candidates:
            measured.append(choice_measures(asked, said, classes if task is Task.DIAGNOSIS else ()))
        else:
            measured.append(open_measures(asked, said))
    resampler = Resampler(np.array([row.owner for row in members]))
    scores = []
    for systems in zip(*measured, strict=True):
        drawn = [resampler.scores(measure) for measure in systems]
        differences = [
            Difference(
                resampler.difference(systems[0], other, (drawn[0], drawn[index])),
                resampler.randomisation(systems[0], other) if group[0] == ALL else None,
                _mcnemar(systems[0], other) if group[0] == ALL and other.share else None,
            )
            for index, other in enumerate(systems)
            if index
        ]
        intervals = tuple(resampler.interval(measure, own) for measure, own in zip(systems, drawn, strict=True))
        scores.append(
            Score(
                task,
                systems[0].name,
                language or None,
                *group,
                len(members),
                resampler.cases,
                intervals,
                tuple(differences),
            )
        )
    return scores


def _mcnemar(first: Measure, second: Measure) -> McNemar:
    return mcnemar([bool(row[0]) for row in first.rows], [bool(row[0]) for row in second.rows])


def _classes(rows: Sequence[Asked]) -> tuple[str, ...]:
    """What diagnoses are counted by: the options' wordings where they come again and again, else their letters."""
    asked = [row.question for row in rows if row.question.task is Task.DIAGNOSIS]
    named = dict.fromkeys(name for question in asked for name in question.classes)
    if not asked or len(named) <= MOST_CLASSES:
        return tuple(named)
    return tuple("ABCDEFGHIJ"[: max(len(question.candidates) for question in asked)])


def _confusion(rows: Sequence[Asked], classes: tuple[str, ...], names: Sequence[str]) -> tuple[Confusion, ...]:
    if not classes:
        return ()
    counts = np.zeros((len(names), len(classes), len(classes)), int)
    for row in rows:
        if row.question.task is Task.DIAGNOSIS:
            meant = class_names(row.question, classes)
            for system, said in enumerate(row.said):
                counts[
                    system, classes.index(meant[row.question.right or 0]), classes.index(meant[said.chosen or 0])
                ] += 1
    return tuple(
        Confusion(name, tuple(tuple(map(int, line)) for line in table))
        for name, table in zip(names, counts, strict=True)
    )


def _answer(row: Asked) -> Answer:
    question, first = row.question, row.said[0]
    right: list[bool | None]
    if question.task is Task.REPORT:
        right = [None] * len(row.said)
        badness = 1 - float(text_statistics(first.text, question.references, question.language)[-1])
    elif question.candidates:
        right = [said.chosen == question.right for said in row.said]
        badness = 1 - first.probabilities[question.right or 0]
    else:
        right = [matches(said.text, question.references) for said in row.said]
        badness = 0.0 if right[0] else 1.0
    return Answer(
        row.owner,
        row.case.name,
        question.task,
        question.kind,
        row.case.region,
        question.text,
        question.references[0],
        tuple(said.text for said in row.said),
        tuple(right),
        badness,
    )
