"""Qwen2-VL's chat format as token ids: every prompt of training, hints and questions is built here."""

from collections.abc import Sequence

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.tokens import Tokenizer

SYSTEM = {"en": "You are an ultrasound assistant.", "zh": "你是一名超声助手。"}
HINT_LANGUAGE = "en"  # hints in either language share one prefix a frame
REPORT = {
    "en": "Write a short report.",
    "zh": "请写一份简短报告。",
}  # as the packaged checkpoint was taught to be asked
LETTERS = "ABCDEFGHIJ"


def prefix_ids(tokenizer: Tokenizer, merged: Sequence[int], language: str) -> list[int]:
    """Return system turn, user opening and one vision block of `merged[i]` image tokens per image.

    Raises SonoEdgeError for a language without a system turn.
    """
    if language not in SYSTEM:
        raise SonoEdgeError(f"there is no prompt in language {language!r}: choose one of {', '.join(SYSTEM)}")
    ids = [tokenizer.im_start, *tokenizer.encode("system\n" + SYSTEM[language]), tokenizer.im_end]
    ids += [*tokenizer.encode("\n"), tokenizer.im_start, *tokenizer.encode("user\n")]
    for count in merged:
        ids += [tokenizer.vision_start, *[tokenizer.image_pad] * count, tokenizer.vision_end]
    return ids


def question_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    """Return the question, the end of the user's turn and the opening of the assistant's."""
    ids = [*tokenizer.encode(question), tokenizer.im_end, *tokenizer.encode("\n")]
    return [*ids, tokenizer.im_start, *tokenizer.encode("assistant\n")]


def conversation_ids(tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], question: str) -> list[int]:
    """Return earlier questions with their answers, then the question: what follows the pictures."""
    ids: list[int] = []
    for asked, answered in turns:
        ids += [*question_ids(tokenizer, asked), *answer_ids(tokenizer, answered)]
        ids += next_turn_ids(tokenizer)
    return [*ids, *question_ids(tokenizer, question)]


def next_turn_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the opening of a user's turn that follows an answer."""
    return [*tokenizer.encode("\n"), tokenizer.im_start, *tokenizer.encode("user\n")]


def single_choice(question: str, choices: Sequence[str]) -> str:
    """Return the question with its choices behind letters, one of which is the answer."""
    listed = " ".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question} {listed}"


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Return the answer and the end of the assistant's turn."""
    return [*tokenizer.encode(answer), tokenizer.im_end]
