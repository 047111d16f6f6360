"""Questions, answers and reports in English and Chinese, built from the truth of a phantom and from nothing else."""

import re

import msgspec
import numpy as np

from sonoedge.calibration.phantom.truth import KINDS, Truth
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.hints import LANGUAGES, HintSpec, load_schema

REPORT = "report"
DIAGNOSIS = "diagnosis"
SIZE_STEP_MM = 5

_SCHEMA = load_schema()
_LETTERS = "ABCDE"

# the canonical wording of the hints is the schema's; these are other ways to ask the same
_PARAPHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "region": {
        "en": ("Which part of the body is this?", "What region does this scan show?", "Name the region.", "What is being scanned?"),
        "zh": ("这是哪个部位的超声？", "这幅图像是哪个部位？", "请说出检查部位。", "扫查的是什么部位？"),
    },
    "quality": {
        "en": ("What is the image quality?", "Is the image quality good or poor?", "Rate the image quality.", "How is the quality?"),
        "zh": ("图像质量怎么样？", "请评价图像质量。", "图像质量是良好还是较差？", "这幅图像清晰吗？"),
    },
    "finding": {
        "en": ("Is there a lesion?", "Do you see a lesion?", "Does the image show a lesion?", "Any lesion here?"),
        "zh": ("有没有病灶？", "图中有病灶吗？", "是否发现病灶？", "能看到病灶吗？"),
    },
    "kind": {
        "en": ("Which kind of lesion is this?", "What type is the lesion?", "How would you classify the lesion?", "Name the kind of lesion."),
        "zh": ("这是哪一类病灶？", "病灶是什么类型？", "请对病灶分类。", "属于什么病灶？"),
    },
    "side": {
        "en": ("Is the lesion on the left or the right?", "Which side is the lesion on?", "On which side does it lie?", "Left or right?"),
        "zh": ("病灶在左侧还是右侧？", "病灶在哪一侧？", "病灶位于哪边？", "左侧还是右侧？"),
    },
    DIAGNOSIS: {
        "en": ("Choose the best answer.", "Which option fits the image?", "Select one option.", "Pick the right option."),
        "zh": ("请选择最合适的选项。", "哪个选项符合图像？", "请单选。", "请选出正确选项。"),
    },
    REPORT: {
        "en": ("Describe this ultrasound image.", "Please report this scan.", "Give a brief report.", "What does the image show?"),
        "zh": ("请描述这幅超声图像。", "请为这幅图像写报告。", "请给出简要报告。", "图像显示了什么？"),
    },
}
_OWN_QUESTIONS = {
    DIAGNOSIS: {"en": "What is the finding?", "zh": "图像所见是什么？"},
    REPORT: {"en": "Write a short report.", "zh": "请写一份简短报告。"},
}
_NO_LESION = {"en": "no lesion", "zh": "无病灶"}

_REPORTS: dict[str, tuple[tuple[str, str, str], ...]] = {  # opening, with a lesion, without one
    "en": (
        (
            "Ultrasound of the {region}, image quality {quality}.",
            "{A kind} of about {size} mm lies {depth} on the {side}. {sign}",
            "No lesion is seen.",
        ),
        (
            "The image shows the {region}; its quality is {quality}.",
            "There is {a kind} on the {side} side, {depth}, about {size} mm across. {sign}",
            "There is no lesion.",
        ),
        (
            "Region: {region}. Quality: {quality}.",
            "Finding: {kind}, {side}, {depth}, {size} mm.",
            "Finding: no lesion.",
        ),
    ),
    "zh": (
        ("{region}超声，图像质量{quality}。", "{side}{depth}可见{kind}，大小约{size}毫米。{sign}", "未见病灶。"),
        ("图像显示{region}，质量{quality}。", "图像{side}{depth}探及一处{kind}，直径约{size}毫米。{sign}", "未探及病灶。"),
        ("部位：{region}。质量：{quality}。", "所见：{kind}，{side}，{depth}，{size}毫米。", "所见：无病灶。"),
    ),
}
_SIGNS = {
    "en": {
        "cyst": "The echoes behind it are enhanced.",
        "oval_solid": "Its margin is smooth.",
        "irregular_solid": "Its margin is irregular and it casts a shadow.",
        "calcification": "It is bright and casts a clean shadow.",
    },
    "zh": {
        "cyst": "后方回声增强。",
        "oval_solid": "边界光滑。",
        "irregular_solid": "边界不规则，后方有声影。",
        "calcification": "呈强回声，后方声影清晰。",
    },
}
_DEPTHS = {"en": {"shallow": "shallow", "deep": "deep"}, "zh": {"shallow": "浅部", "deep": "深部"}}
_ABSENT = {"en": ("no lesion",), "zh": ("未见病灶", "未探及病灶", "无病灶")}
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
    """The schema's questions about a frame with their answers; a question that depends on a lesion only where there is one.

    With `rng` the questions are paraphrased half of the time. Raises SonoEdgeError for an unknown language or a region that no
    candidate names.
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
    options = [_NO_LESION[language] if i == "none" else _words(kind, language, i) for i in ids]
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
    others = _PARAPHRASES[question_name][language]
    return others[int(rng.integers(len(others)))]


def report(truth: Truth, language: str, rng: np.random.Generator | None = None) -> tuple[str, str]:
    """A question that asks for a report, and the report in two or three short sentences; `rng` chooses the phrasing."""
    question = _canonical(REPORT, language) if rng is None else paraphrase(REPORT, language, rng)
    phrasings = _REPORTS[language]
    opening, present, absent = phrasings[0 if rng is None else int(rng.integers(len(phrasings)))]
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
            "depth": _DEPTHS[language][fields.depth],
            "size": str(fields.size_mm),
            "sign": _SIGNS[language][fields.kind],
        }
    body = absent if fields.kind is None else present
    joint = " " if language == "en" else ""
    return question, f"{opening}{joint}{body}".format_map(words)


def report_fields(text: str, language: str) -> ReportFields:
    """Read a report back into fields, so that each can be scored alone; raises SonoEdgeError for an unknown language."""
    _canonical(REPORT, language)
    lower = text.lower()
    kind = _find("kind", lower, language)
    absent = any(words in lower for words in _ABSENT[language])
    size = _SIZE[language].search(lower)
    depths = [depth for depth, words in _DEPTHS[language].items() if words in lower]
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
    if question_name in _OWN_QUESTIONS:
        return _OWN_QUESTIONS[question_name][language]
    return _SCHEMA.hint(question_name).question.get(language)


def _words(hint: HintSpec, language: str, answer_id: str) -> str:
    for candidate in hint.candidates:
        if candidate.id == answer_id:
            return candidate.text.get(language)
    raise SonoEdgeError(f"hint {hint.name!r} has no candidate {answer_id!r}; ask only about {', '.join(hint.candidate_ids())}")
