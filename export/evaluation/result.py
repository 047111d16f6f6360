"""The result of an evaluation, as it is written to `evaluation.json`."""

from __future__ import annotations

import msgspec

from sonoedge.calibration.check_data import DataCheck
from sonoedge.calibration.questions import Task
from sonoedge.export.evaluation.measures import DEFINITIONS
from sonoedge.export.evaluation.resampling import FEWEST_CASES, LEVEL, PERMUTATIONS, RESAMPLES, SEED, Interval, McNemar
from sonoedge.export.fidelity.text_scores import TOKENIZATION

ALL = "all"  # the group that holds every question


class System(msgspec.Struct, frozen=True):
    """One model that was evaluated; the first is what others are compared with."""

    name: str
    path: str
    what: str  # architecture and size, in words


class Difference(msgspec.Struct, frozen=True):
    """A system's score less the first's; p-values for the group of all questions, McNemar's of right and wrong ones."""

    interval: Interval
    p_value: float | None = None  # approximate randomisation
    mcnemar: McNemar | None = None


class Score(msgspec.Struct, frozen=True):
    """One measure of one group of questions; values and differences in the order of the systems."""

    task: Task
    measure: str
    language: str | None  # of the texts; None: all languages together
    group: str  # "all", "region", "outside region", "kind", "language", "quality", "contrast", "sharpness"
    value: str  # which of the groups
    questions: int
    cases: int
    systems: tuple[Interval, ...]
    differences: tuple[Difference, ...]  # of all systems but the first


class Confusion(msgspec.Struct, frozen=True):
    """How often a class was wanted (row) and said (column)."""

    system: str
    counts: tuple[tuple[int, ...], ...]


class Answer(msgspec.Struct, frozen=True):
    """One question with what every system answered, in their order."""

    case: int
    name: str
    task: Task
    kind: str
    region: str | None
    question: str
    reference: str
    answers: tuple[str, ...]
    right: tuple[bool | None, ...]  # None: a text, which is not simply right or wrong
    badness: float  # of the first system: 1 less ROUGE-L of a text, or less the probability of the right candidate


class Resampling(msgspec.Struct, frozen=True):
    """How intervals and p-values were made."""

    unit: str = "case, with all its questions"
    seed: int = SEED
    level: float = LEVEL
    resamples: int = RESAMPLES
    permutations: int = PERMUTATIONS
    fewest_cases: int = FEWEST_CASES  # for bounds
    interval: str = "percentile bootstrap; where all answers are right, or none is, the exact binomial bound"
    p_value: str = "approximate randomisation, two-sided; McNemar exact takes questions as independent"


class Evaluation(msgspec.Struct, frozen=True):
    """Everything that was measured. `frames`, `accuracy` and `strata` are the first system's hints on phantoms."""

    frames: int
    data: str
    systems: tuple[System, ...]
    questions: int
    scores: tuple[Score, ...]
    accuracy: dict[str, float] | msgspec.UnsetType = msgspec.UNSET
    strata: dict[str, dict[str, float]] | msgspec.UnsetType = msgspec.UNSET
    classes: tuple[str, ...] = ()  # of the diagnoses
    confusion: tuple[Confusion, ...] = ()
    worst: tuple[Answer, ...] = ()
    notes: tuple[str, ...] = ()
    check: DataCheck | None = None
    definitions: dict[str, str] = msgspec.field(default_factory=lambda: dict(DEFINITIONS))
    tokenization: dict[str, str] = msgspec.field(default_factory=lambda: dict(TOKENIZATION))
    resampling: Resampling = Resampling()

    def find(self, task: Task, measure: str, group: str = ALL, value: str = ALL, language: str | None = None) -> Score:
        """The one score that is asked for; raises KeyError when it was not measured."""
        for score in self.scores:
            if (score.task, score.measure, score.group, score.value) == (task, measure, group, value) and (
                language is None or score.language == language
            ):
                return score
        raise KeyError(f"{task.value} {measure} of {group} {value} was not measured")
