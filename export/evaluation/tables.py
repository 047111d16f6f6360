"""Scores as tables: one definition of rows for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from sonoedge.calibration.questions import Task
from sonoedge.export.evaluation.groups import QUARTERS
from sonoedge.export.evaluation.resampling import Interval
from sonoedge.export.evaluation.result import ALL, Evaluation, Score

TITLES = {
    Task.REPORT: "Reports and other texts",
    Task.DIAGNOSIS: "Diagnosis: single choice",
    Task.VQA: "Questions",
}
ON_TERMINAL = ("region", "kind", "quality")  # of the groups; the page has them all


class Section(msgspec.Struct, frozen=True):
    """The scores of one task, and of one language where it is texts; rows are measures or groups."""

    title: str
    measures: tuple[Score, ...]  # of all questions
    groups: dict[str, tuple[Score, ...]]  # by dimension, of the first measure and the last


def sections(evaluation: Evaluation) -> tuple[Section, ...]:
    """Every task and language that was asked for."""
    found = []
    keys = dict.fromkeys((score.task, score.language, _family(score)) for score in evaluation.scores)
    for task, language, family in keys:
        own = [s for s in evaluation.scores if (s.task, s.language, _family(s)) == (task, language, family)]
        whole = tuple(s for s in own if s.group == ALL)
        led = {whole[0].measure, "ROUGE-L" if task is Task.REPORT else whole[-1].measure}
        groups = {
            group: tuple(sorted((s for s in own if s.group == group and s.measure in led), key=_order))
            for group in dict.fromkeys(s.group for s in own if s.group != ALL)
        }
        title = TITLES[task] + ({"en": ", English", "zh": ", Chinese"}[language] if language else "")
        title += {"choice accuracy": " with candidates", "exact match": " answered in words"}.get(family, "")
        found.append(Section(title, whole, groups))
    return tuple(found)


def words(interval: Interval, *, signed: bool = False) -> str:
    """A score with its bounds, such as `71.4 [68.0, 74.9]`."""
    form = "+.1f" if signed else ".1f"
    bounds = "" if interval.low is None else f" [{interval.low:{form}}, {interval.high:{form}}]"
    return f"{interval.value:{form}}{bounds}"


def significance(score: Score, index: int) -> str:
    """What the tests say of the difference to the first system, a line each; empty where none was made."""
    difference = score.differences[index]
    if difference.p_value is None:
        return ""
    told = f"p = {difference.p_value:.3f}"
    if difference.mcnemar is not None:
        told += f"\nMcNemar {difference.mcnemar.p_value:.3f}"
        told += f" ({difference.mcnemar.first_only} : {difference.mcnemar.second_only})"
    return told


def print_evaluation(evaluation: Evaluation, console: Console | None = None) -> None:
    """One table a section: a row a measure and group, a column a system and a difference."""
    out = console or Console()
    for section in sections(evaluation):
        first = section.measures[0]
        table = Table("", title=f"{section.title}: {first.questions:,} questions, {first.cases:,} cases")
        for index, system in enumerate(evaluation.systems):
            table.add_column(system.name, justify="right")
            if index:
                table.add_column("difference to the first", justify="right")
        for score in section.measures:
            table.add_row(score.measure, *_cells(score))
        for group in ON_TERMINAL:
            for score in section.groups.get(group, ()):
                table.add_row(f"{score.measure}, {label(group, score.value)} ({score.questions:,})", *_cells(score))
        out.print(table)
    for note in evaluation.notes:
        out.print(note, markup=False, highlight=False)


def label(group: str, value: str) -> str:
    """A group in words."""
    return {"outside region": f"all but {value}", "region": value, "kind": value, "language": value}.get(
        group, f"{group}: {value}"
    )


def _cells(score: Score) -> Sequence[str]:
    cells = [words(score.systems[0])]
    for index, interval in enumerate(score.systems[1:]):
        told = significance(score, index)
        cells += [
            words(interval),
            words(score.differences[index].interval, signed=True) + (f"\n{told}" if told else ""),
        ]
    return cells


def _family(score: Score) -> str:
    return score.measure if score.task is Task.VQA else ""


def _order(score: Score) -> tuple[str, int, str]:
    """By measure, then quarters in their order, other groups by name."""
    return score.measure, QUARTERS.index(score.value) if score.value in QUARTERS else 0, score.value
