"""`evaluation.html`: one self-contained page of tables, intervals and worst cases; every word on it is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sonoedge.export.evaluation.cases import Cases
from sonoedge.export.evaluation.result import Answer, Confusion, Evaluation, Score
from sonoedge.export.evaluation.tables import ON_TERMINAL, Section, label, sections, significance, words
from sonoedge.export.fidelity.markup import Html, Part, table
from sonoedge.export.fidelity.page import document, inline_picture

STYLE = """
body { max-width: 72rem; } td { white-space: pre; } .case td { white-space: normal; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; } dl { margin: 0; }
dt { font-weight: 600; } dd { margin: 0 0 .4rem 1rem; }
.confusion table { width: auto; } .confusion { overflow-x: auto; }
"""
DIMENSIONS = {
    "region": "Region by region",
    "outside region": "One region left out",
    "kind": "By kind of question",
    "language": "By language of the question",
    "quality": "By image quality",
    "contrast": "By contrast: the spread of grey values of the first picture, quarters of the cases",
    "sharpness": "By sharpness: variance of the Laplacian of the first picture at 256 pixels, quarters of the cases",
}


def evaluation_html(evaluation: Evaluation, cases: Cases | None = None) -> str:
    """The page; `cases` are those that were asked and give the pictures beside the worst answers."""
    names = [system.name for system in evaluation.systems]
    parts = [
        _opening(evaluation),
        *(_section(section, names) for section in sections(evaluation)),
        _confusions(evaluation),
        _worst(evaluation, names, cases),
        _footing(evaluation),
    ]
    return document(f"Evaluation of {names[0]}", parts, STYLE)


def _opening(evaluation: Evaluation) -> Html:
    rows = [[system.name, system.what] for system in evaluation.systems]
    counted = f"{evaluation.frames:,} cases, {evaluation.questions:,} questions, the same for every system"
    title = f"<h1>Evaluation: {escape(' against '.join(system.name for system in evaluation.systems))}</h1>"
    told = f'<p class="muted">{escape(evaluation.data)}: {counted}. In brackets: 95 % intervals.</p>'
    return Html(f"{title}{told}{table(['system', 'what it is'], rows)}")


def _section(section: Section, names: Sequence[str]) -> Html:
    first = section.measures[0]
    counted = f"{first.questions:,} questions of {first.cases:,} cases"
    header = ["", names[0]]
    for name in names[1:]:
        header += [name, f"{name} less {names[0]}", "by chance"]
    drawn = table(header, [[score.measure, *_cells(score)] for score in section.measures])
    for group, scores in section.groups.items():
        wide = ["", "questions", names[0]]
        for name in names[1:]:
            wide += [name, f"{name} less {names[0]}"]
        rows: list[list[object]] = []
        for measure in dict.fromkeys(score.measure for score in scores):
            rows.append([measure])
            rows += [
                [Part(label(group, score.value)), f"{score.questions:,}", *_cells(score, tested=False)]
                for score in scores
                if score.measure == measure
            ]
        filled = [row + [""] * (len(wide) - len(row)) for row in rows]
        title, listed = escape(DIMENSIONS[group]), table(wide, filled)
        if group in ON_TERMINAL:
            drawn = Html(f"{drawn}<h3>{title}</h3>{listed}")
        else:
            drawn = Html(f"{drawn}<details><summary>{title}</summary>{listed}</details>")
    return Html(f'<h2>{escape(section.title)}</h2><p class="muted">{counted}</p>{drawn}')


def _cells(score: Score, *, tested: bool = True) -> list[str]:
    cells = [words(score.systems[0])]
    for index, interval in enumerate(score.systems[1:]):
        cells += [words(interval), words(score.differences[index].interval, signed=True)]
        if tested:
            cells.append(significance(score, index))
    return cells


def _confusions(evaluation: Evaluation) -> Html:
    drawn = "".join(_confusion(found, evaluation.classes) for found in evaluation.confusion)
    return Html(f"<h2>What was taken for what</h2>{drawn}" if drawn else "")


def _confusion(found: Confusion, classes: Sequence[str]) -> str:
    rows = [[name, *line] for name, line in zip(classes, found.counts, strict=True)]
    drawn = table(["wanted, said →", *classes], rows)
    return f'<h3>{escape(found.system)}</h3><div class="confusion">{drawn}</div>'


def _worst(evaluation: Evaluation, names: Sequence[str], cases: Cases | None) -> Html:
    cards = "".join(_card(answer, names, cases) for answer in evaluation.worst)
    told = f'<p class="muted">The answers in which {escape(names[0])} fails worst, a few of every task.</p>'
    return Html(f"<h2>Worst cases</h2>{told}{cards}" if cards else "")


def _card(answer: Answer, names: Sequence[str], cases: Cases | None) -> str:
    rows: list[list[object]] = [["question", answer.question], ["reference", answer.reference]]
    verdicts = {True: "right: ", False: "wrong: ", None: ""}
    for name, said, right in zip(names, answer.answers, answer.right, strict=True):
        rows.append([name, verdicts[right] + (said or "(says nothing)")])
    shown = ""
    if cases is not None:
        pictures = "".join(inline_picture(image, answer.name) for image in cases[answer.case].images)
        shown = f'<div class="images">{pictures}</div>'
    about = ", ".join(part for part in (answer.region, answer.kind) if part)
    return (
        f'<div class="case">{shown}<div class="said"><h3>{escape(answer.name)}</h3>'
        f"<p><small>{escape(about)}</small></p>{table([], rows)}</div></div>"
    )


def _footing(evaluation: Evaluation) -> Html:
    how = evaluation.resampling
    definitions = {**evaluation.definitions, **{f"tokens, {k}": v for k, v in evaluation.tokenization.items()}}
    definitions["intervals"] = (
        f"{how.interval}; {how.resamples:,} resamples, seed {how.seed}, unit: {how.unit}, level {how.level:.0%}; none "
        f"for fewer than {how.fewest_cases} cases"
    )
    definitions["by chance"] = f"{how.p_value}; {how.permutations:,} permutations"
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(told)}</dd>" for name, told in definitions.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in evaluation.notes)
    return Html(f"<h2>How it was measured</h2><ul>{notes}</ul><dl>{listed}</dl>")
