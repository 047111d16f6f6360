"""What an exchange of a conversation asks for: a text, a single choice, a true or false, or a short open answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum

import msgspec

from sonoedge.calibration.conversations import IMAGE_MARK, Conversation
from sonoedge.runtime.prompt import LETTERS

LONGEST_SHORT_ANSWER = 12  # tokens, Chinese by characters: what is longer, or has two sentences, is a text
CHINESE = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")

_OPTION = re.compile(r"(?:^|(?<=[\s(（，,。；;？?：:]))([A-J])\s*[.．、:：)）]\s*")
_ANSWER = re.compile(
    r"\s*(?:答案|答|answer)?[:：\s]*[(（]?([A-J])(?:\s*([.．、。:：)）]+)\s*|\s*$)(.*)", re.DOTALL | re.IGNORECASE
)
_JUDGEMENTS = (("True", "False"), ("Yes", "No"), ("正确", "错误"), ("对", "错"), ("是", "否"))
_MISSPELT = {"ture": "true"}  # as EchoVLM's own question templates have it
_KINDS = (  # the first whose words stand in the question
    ("report", re.compile(r"报告|report", re.IGNORECASE)),
    ("impression", re.compile(r"诊断|印象|结论|总结|小结|摘要|impression|conclusion|diagnos|summar", re.IGNORECASE)),
    ("findings", re.compile(r"所见|finding", re.IGNORECASE)),
)


class Task(Enum):
    """What is measured: texts by BLEU and ROUGE, diagnoses by accuracy and F1, other questions by accuracy."""

    REPORT = "report"
    DIAGNOSIS = "diagnosis"
    VQA = "vqa"


class Question(msgspec.Struct, frozen=True):
    """One question about the pictures of a case, and its right answer.

    kind: of the task, in words. candidates: answers to choose among, empty for a question that is answered in words;
    `right` is the index of the right one and `classes` say what each means. turns: what was said before it.
    """

    task: Task
    kind: str
    text: str
    references: tuple[str, ...]  # wordings of the right answer
    candidates: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    right: int | None = None
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def language(self) -> str:
        """The language of the answer where it is a text, else that of the question."""
        return guess_language(self.references[0] if self.task is Task.REPORT else self.text)


def guess_language(text: str) -> str:
    """Return "zh" for a text with Chinese characters, else "en"."""
    return "zh" if CHINESE.search(text) else "en"


def questions(case: Conversation) -> tuple[Question, ...]:
    """The exchanges of a case as questions, each after those before it with their right answers."""
    turns = [(question.replace(IMAGE_MARK, "").strip(), answer.strip()) for question, answer in case.exchanges]
    return tuple(_question(*turn, turns[:index]) for index, turn in enumerate(turns))


def options(question: str) -> dict[str, str]:
    """The choices that a question lists behind letters, at least two and in the alphabet's order; else none."""
    found = list(_OPTION.finditer(question))
    # Letters of the question's own words stand before the list: it begins at the last A.
    start = max((index for index, match in enumerate(found) if match[1] == "A"), default=len(found))
    listed: dict[str, str] = {}
    for letter, match, after in zip(LETTERS, found[start:], [*found[start + 1 :], None], strict=False):
        if match[1] != letter:
            return {}
        listed[letter] = question[match.end() : after.start() if after else None].strip(" \n\t;；,，。(（")
    return listed if len(listed) > 1 else {}


def _question(text: str, answer: str, turns: Sequence[tuple[str, str]]) -> Question:
    asked = _single_choice(text, answer) or _judgement(text, answer)
    if asked is None:
        short = len(_words(answer)) <= LONGEST_SHORT_ANSWER and not re.search(r"[。;；!?！？]\s*\S|[.]\s+\S", answer)
        kind = "open question" if short else next((kind for kind, words in _KINDS if words.search(text)), "description")
        asked = Question(Task.VQA if short else Task.REPORT, kind, text, (answer,))
    return msgspec.structs.replace(asked, turns=tuple(turns))


def _single_choice(text: str, answer: str) -> Question | None:
    """A single choice, its candidates worded as the answer is: letters, letters with their options, or options."""
    listed = options(text)
    if not listed:
        return None
    letters, texts = tuple(listed), tuple(listed.values())
    found = _ANSWER.fullmatch(answer)
    if found and found[1].upper() in listed:
        letter, mark, rest = found[1].upper(), found[2] or "", found[3]
        repeats = rest.strip() and _plain(rest) == _plain(listed[letter])
        gap = answer[found.end(2) : found.start(3)] if repeats else ""
        candidates = tuple(f"{own}{mark}{gap}{words}" for own, words in listed.items()) if repeats else letters
        right = letters.index(letter)
    elif _plain(answer) in [_plain(words) for words in texts]:
        candidates, right = texts, [_plain(words) for words in texts].index(_plain(answer))
    else:
        return None
    return Question(Task.DIAGNOSIS, "single choice", text, (answer,), candidates, texts, right)


def _judgement(text: str, answer: str) -> Question | None:
    said = _plain(answer)
    said = _MISSPELT.get(said, said)
    for pair in _JUDGEMENTS:
        plain = [word.lower() for word in pair]
        if said in plain:
            words = tuple(plain) if answer[:1].islower() else pair
            return Question(Task.VQA, "true or false", text, (answer,), words, pair, plain.index(said))
    return None


def _plain(text: str) -> str:
    return re.sub(r"[\s.。．!！;；,，:：]+$", "", text.strip()).lower()


def _words(text: str) -> list[str]:
    return re.findall(r"[\u3400-\u9fff\uf900-\ufaff]|[^\W\u3400-\u9fff\uf900-\ufaff]+", text)
