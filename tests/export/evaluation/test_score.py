"""Which questions are scored together, and what the differences of systems say."""

import pytest

from sonoedge.calibration.questions import Question, Task
from sonoedge.export.evaluation.answers import Answered, Said, Seen
from sonoedge.export.evaluation.result import Score
from sonoedge.export.evaluation.score import Scored, score

REGIONS = ("liver", "kidney", "heart")


def answered(right: int, *, cases: int = 24, quality: str | None = None) -> Answered:
    """Cases of three regions: a report, a choice, a short answer; the first `right` cases are answered rightly."""
    seen, said = [], []
    for number in range(cases):
        asked = (
            Question(Task.REPORT, "report", "Report.", ("No lesion is seen in the organ.",)),
            Question(Task.DIAGNOSIS, "single choice", "? A. x B. y", ("A",), ("A", "B"), ("x", "y"), 0),
            Question(Task.VQA, "open question", "Which side?", ("left",)),
            Question(Task.VQA, "true or false", "对吗？", ("对",), ("对", "错"), ("对", "错"), 0),
        )
        seen.append(Seen(f"case {number}", asked, REGIONS[number % 3], quality, float(number), float(-number)))
        good = number < right
        said.append(
            (
                Said(asked[0].references[0] if good else "A cyst.", "stop"),
                Said("A", "stop", 0, (0.9, 0.1)) if good else Said("B", "stop", 1, (0.2, 0.8)),
                Said("left" if good else "right", "stop"),
                Said("对", "stop", 0, (0.9, 0.1)),
            )
        )
    return Answered(tuple(seen), tuple(said))


@pytest.fixture(scope="module")
def scored() -> Scored:
    return score([answered(12), answered(18)], ["one", "two"])


def find(scored: Scored, measure: str, group: str = "all", value: str = "all") -> Score:
    (found,) = [s for s in scored.scores if (s.measure, s.group, s.value) == (measure, group, value)]
    return found


def test_every_task_has_its_measures(scored: Scored) -> None:
    found = {(s.task, s.measure) for s in scored.scores}
    assert {measure for task, measure in found if task is Task.REPORT} == {
        *(f"BLEU-{n}" for n in (1, 2, 3, 4)),
        "ROUGE-1",
        "ROUGE-L",
    }
    assert {measure for task, measure in found if task is Task.DIAGNOSIS} == {"accuracy", "macro-F1"}
    assert {measure for task, measure in found if task is Task.VQA} == {"choice accuracy", "exact match"}


def test_values_intervals_and_differences_are_of_the_same_cases(scored: Scored) -> None:
    found = find(scored, "accuracy")
    assert (found.questions, found.cases) == (24, 24)
    assert [system.value for system in found.systems] == [50, 75]
    (difference,) = found.differences
    assert difference.interval.value == 25
    assert difference.interval.low is not None
    assert 0 < difference.interval.low < 25
    assert difference.mcnemar is not None
    assert (difference.mcnemar.first_only, difference.mcnemar.second_only) == (0, 6)
    assert difference.mcnemar.p_value == pytest.approx(2 / 2**6)
    assert difference.p_value is not None
    assert difference.p_value < 0.1


def test_each_region_and_all_the_others(scored: Scored) -> None:
    for region in REGIONS:
        assert find(scored, "accuracy", "region", region).questions == 8
        assert find(scored, "accuracy", "outside region", region).questions == 16
    parts = [find(scored, "accuracy", "region", region).systems[0].value for region in REGIONS]
    assert sum(parts) / 3 == pytest.approx(50)


def test_quarters_of_contrast_and_sharpness_where_quality_is_not_known(scored: Scored) -> None:
    lowest, highest = (find(scored, "accuracy", "contrast", f"{end} quarter") for end in ("lowest", "highest"))
    assert (lowest.questions, lowest.systems[0].value, highest.systems[0].value) == (6, 100, 0)
    assert find(scored, "accuracy", "sharpness", "lowest quarter").systems[0].value == 0
    known = score([answered(12, quality="good")], ["one"])
    assert not [s for s in known.scores if s.group in ("contrast", "sharpness")]
    assert find(known, "accuracy", "quality", "good").questions == 24


def test_confusion_and_the_worst_answers(scored: Scored) -> None:
    assert scored.classes == ("x", "y")
    assert [found.counts for found in scored.confusion] == [((12, 12), (0, 0)), ((18, 6), (0, 0))]
    assert {answer.task for answer in scored.worst} == set(Task)
    assert all(answer.case >= 12 for answer in scored.worst)
    choices = [answer for answer in scored.worst if answer.task is Task.DIAGNOSIS]
    assert choices[0].answers[0] == "B"
    assert choices[0].badness == pytest.approx(0.8)


def test_options_of_too_many_wordings_are_counted_by_letter() -> None:
    cases = answered(12)
    asked = tuple(
        Seen(
            seen.name,
            (Question(Task.DIAGNOSIS, "single choice", "?", ("A",), ("A", "B"), (f"x{n}", f"y{n}"), 0),),
            None,
            None,
            0.0,
            0.0,
        )
        for n, seen in enumerate(cases.cases)
    )
    found = score([Answered(asked, tuple(said[1:2] for said in cases.said))], ["one"])
    assert found.classes == ("A", "B")
    assert find(found, "macro-F1").systems[0].value == pytest.approx(100 * (2 / 3 + 0) / 2)
