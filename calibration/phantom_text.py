"""Questions, answers and reports in English and Chinese, built from the truth of a phantom and from nothing else."""

import re

import msgspec
import numpy as np

from sonoedge.calibration.phantom.truth import KINDS, Truth
from sonoedge.calibration.phantom_wording import (
    ABSENT,
    DEPTHS,
    DIAGNOSIS,
    NO_LESION,
    OWN_QUESTIONS,
    PARAPHRASES,
    REPORT,
    REPORTS,
    SIGNS,
)
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.hints import LANGUAGES, HintSpec, load_schema

SIZE_STEP_MM = 5

_SCHEMA = load_schema()
_LETTERS = "ABCDE"

_SIZE = {"en": re.compile(r"(\d+)\s*mm"), "zh": re.compile(r"(\d+)\s*毫米")}


class ClosedQuestion(msgspec.Struct, frozen=True):
    """A question with a fixed set of answers, and the right one."""

    name: str
    question: str
    answer: str
    answer_id: str
    candidates: tuple[str, ...]  # texts, in the schema's order


class ReportFields(msgspec.Struct, frozen=True):
    """What a report says, field by field; None where it says nothing."""

    region: str | None
    quality: str | None
    finding: str | None
    kind: str | None
    side: str | None
    depth: str | None  # "shallow" or "deep"
    size_mm: int | None


def truth_fields(truth: Truth) -> ReportFields:
    """The fields that a right report of this frame has."""
    lesion = truth.lesion
    if lesion is None:
        return ReportFields(truth.region, truth.quality, "absent", None, None, None, None)
    size_mm = max(SIZE_STEP_MM, SIZE_STEP_MM * round(lesion.size_mm / SIZE_STEP_MM))
    depth = "shallow" if lesion.centre_px[1] < truth.size / 2 else "deep"
    return ReportFields(truth.region, truth.quality, "present", lesion.kind, lesion.side, depth, size_mm)


def closed_questions(truth: Truth, language: str, rng: np.random.Generator | None = None) -> tuple[ClosedQuestion, ...]:
    """The schema's questions about a frame with their answers; those about a lesion only where there is one.

    With `rng` the questions are paraphrased half of the time. Raises SonoEdgeError for an unknown language or a region
    that no candidate names.
    """
    fields = truth_fields(truth)
    asked = []
    for hint in _SCHEMA.hints:
        if hint.ask_when is not None and getattr(fields, hint.ask_when.hint) != hint.ask_when.answer:
            continue
        answer_id = getattr(fields, hint.name)
        question = hint.question.get(language) if rng is None else paraphrase(hint.name, language, rng)
        answer = _words(hint, language, answer_id)
        texts = tuple(candidate.text.get(language) for candidate in hint.candidates)
        asked.append(ClosedQuestion(hint.name, question, answer, answer_id, texts))
    return tuple(asked)


def diagnosis(truth: Truth, language: str, rng: np.random.Generator | None = None) -> ClosedQuestion:
    """The finding as a single choice ("A. … B. …") answered by a letter; `rng` shuffles the options and paraphrases."""
    ids = [*KINDS, "none"]
    if rng is not None:
        ids = [ids[int(i)] for i in rng.permutation(len(ids))]
    question = _canonical(DIAGNOSIS, language) if rng is None else paraphrase(DIAGNOSIS, language, rng)
    kind = _SCHEMA.hint("kind")
    options = [NO_LESION[language] if i == "none" else _words(kind, language, i) for i in ids]
    letters = _LETTERS[: len(ids)]
    listed = " ".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    answer_id = truth.lesion.kind if truth.lesion else "none"
    return ClosedQuestion(DIAGNOSIS, f"{question} {listed}", letters[ids.index(answer_id)], answer_id, tuple(letters))


def paraphrase(question_name: str, language: str, rng: np.random.Generator) -> str:
    """One wording of a question: the canonical one half of the time, else one of its paraphrases.

    Raises SonoEdgeError for an unknown question or language.
    """
    canonical = _canonical(question_name, language)
    if rng.random() < 0.5:
        return canonical
    others = PARAPHRASES[question_name][language]
    return others[int(rng.integers(len(others)))]


def report(truth: Truth, language: str, rng: np.random.Generator | None = None) -> tuple[str, str]:
    """A question that asks for a report, and the report in two or three short sentences; `rng` chooses the phrasing."""
    question = _canonical(REPORT, language) if rng is None else paraphrase(REPORT, language, rng)
    return question, _phrased(truth, language, 0 if rng is None else int(rng.integers(len(REPORTS[language]))))


def report_phrasings(truth: Truth, language: str) -> tuple[str, ...]:
    """Every phrasing of the right report, the canonical one first; raises SonoEdgeError for an unknown language."""
    _canonical(REPORT, language)
    return tuple(_phrased(truth, language, index) for index in range(len(REPORTS[language])))


def _phrased(truth: Truth, language: str, phrasing: int) -> str:
    opening, present, absent = REPORTS[language][phrasing]
    fields = truth_fields(truth)
    words = {
        "region": _words(_SCHEMA.hint("region"), language, truth.region),
        "quality": _words(_SCHEMA.hint("quality"), language, truth.quality),
    }
    if fields.kind is not None and fields.side is not None and fields.depth is not None:
        kind = _words(_SCHEMA.hint("kind"), language, fields.kind)
        with_article = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
        words |= {
            "kind": kind,
            "a kind": with_article,
            "A kind": with_article.capitalize(),
            "side": _words(_SCHEMA.hint("side"), language, fields.side),
            "depth": DEPTHS[language][fields.depth],
            "size": str(fields.size_mm),
            "sign": SIGNS[language][fields.kind],
        }
    body = absent if fields.kind is None else present
    joint = " " if language == "en" else ""
    return f"{opening}{joint}{body}".format_map(words)


def report_fields(text: str, language: str) -> ReportFields:
    """Read a report back into fields, so that each can be scored alone.

    Raises SonoEdgeError for an unknown language.
    """
    _canonical(REPORT, language)
    lower = text.lower()
    kind = _find("kind", lower, language)
    absent = any(words in lower for words in ABSENT[language])
    size = _SIZE[language].search(lower)
    depths = [depth for depth, words in DEPTHS[language].items() if words in lower]
    return ReportFields(
        region=_find("region", lower, language),
        quality=_find("quality", lower, language),
        finding="absent" if absent else "present" if kind else None,
        kind=None if absent else kind,
        side=None if absent else _find("side", lower, language),
        depth=depths[0] if len(depths) == 1 and not absent else None,
        size_mm=int(size.group(1)) if size and not absent else None,
    )


def _find(name: str, lower: str, language: str) -> str | None:
    """The id of the one candidate whose words are in the text; None where none or several are."""
    found = []
    for candidate in _SCHEMA.hint(name).candidates:
        words = candidate.text.get(language)
        inside = re.search(rf"\b{re.escape(words)}\b", lower) if language == "en" else words in lower
        if inside:
            found.append(candidate.id)
    return found[0] if len(found) == 1 else None


def _canonical(question_name: str, language: str) -> str:
    if language not in LANGUAGES:
        raise SonoEdgeError(f"phantom texts have no language {language!r}; choose one of {', '.join(LANGUAGES)}")
    if question_name in OWN_QUESTIONS:
        return OWN_QUESTIONS[question_name][language]
    return _SCHEMA.hint(question_name).question.get(language)


def _words(hint: HintSpec, language: str, answer_id: str) -> str:
    for candidate in hint.candidates:
        if candidate.id == answer_id:
            return candidate.text.get(language)
    raise SonoEdgeError(
        f"hint {hint.name!r} has no candidate {answer_id!r}; ask only about {', '.join(hint.candidate_ids())}"
    )
