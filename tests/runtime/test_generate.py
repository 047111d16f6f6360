"""Greedy generation on the fake session: streaming, limits, pauses."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.generate import Generation, generate
from sonoedge.runtime.look import Look, Prompt, Prompter, look_at
from sonoedge.runtime.sessions.fake import FakeSession
from sonoedge.runtime.tokens import Tokenizer

Shade = Callable[..., Frame]
QUESTION = "What is 这个?"


@pytest.fixture
def prompter(session: FakeSession, tokenizer: Tokenizer) -> Prompter:
    return Prompter(session, tokenizer)


@pytest.fixture
def look(session: FakeSession, shade: Shade) -> Look:
    return look_at(session, shade(128))


@pytest.fixture
def prompt(prompter: Prompter, look: Look) -> Prompt:
    return prompter.question([look], QUESTION, "zh")


def test_streams_the_answer_in_whole_characters(session: FakeSession, tokenizer: Tokenizer, prompt: Prompt) -> None:
    pieces = list(generate(session, tokenizer, prompt, max_tokens=100))
    assert "".join(pieces) == session.answer(QUESTION, 128 / 255) == f"亮度 50 %: {QUESTION}"
    assert len(pieces) > 10
    assert all("\ufffd" not in piece for piece in pieces)


def test_several_images_in_one_question(
    session: FakeSession, tokenizer: Tokenizer, prompter: Prompter, shade: Shade
) -> None:
    looks = [look_at(session, shade(0)), look_at(session, shade(255))]
    answer = "".join(generate(session, tokenizer, prompter.question(looks, "?", "en"), max_tokens=100))
    assert answer == "亮度 50 %: ?"


def test_stops_at_max_tokens_without_half_a_character(
    session: FakeSession, tokenizer: Tokenizer, prompt: Prompt
) -> None:
    generation = Generation(session, tokenizer, prompt, max_tokens=2)
    text = ""
    while generation.finish is None:
        text += generation.step()
    assert (generation.finish, len(generation.ids)) == ("length", 2)
    assert "亮度".startswith(text)


def test_stops_at_the_end_of_the_context(tokenizer: Tokenizer, session: FakeSession, prompt: Prompt) -> None:
    small = FakeSession(tokenizer, session._schema, image=session.image, context=len(prompt.ids) + 4)
    generation = Generation(small, tokenizer, prompt, max_tokens=100)
    while generation.finish is None:
        generation.step()
    assert (generation.finish, len(generation.ids)) == ("length", 4)


def test_a_deadline_and_cancel_end_it(session: FakeSession, tokenizer: Tokenizer, prompt: Prompt) -> None:
    late = Generation(session, tokenizer, prompt, max_tokens=9, deadline_ns=time.monotonic_ns() - 1)
    assert (late.step(), late.finish) == ("", "deadline")
    cancel = threading.Event()
    cancelled = Generation(session, tokenizer, prompt, max_tokens=9, cancel=cancel)
    cancelled.step()
    cancel.set()
    cancelled.step()
    assert (cancelled.finish, len(cancelled.ids)) == ("cancelled", 1)


def test_goes_on_after_others_used_the_session(session: FakeSession, tokenizer: Tokenizer, prompt: Prompt) -> None:
    expected = list(generate(session, tokenizer, prompt, max_tokens=100))
    generation = Generation(session, tokenizer, prompt, max_tokens=100)
    pieces = []
    while generation.finish is None:
        pieces.append(generation.step())
        generation.suspend()
        session.rewind(0)
        session.extend(np.array([5, 6], np.int64), np.array([[0, 1]] * 3, np.int64))
    assert "".join(pieces) == "".join(expected)


def test_a_question_longer_than_the_context_names_both_lengths(
    session: FakeSession, tokenizer: Tokenizer, shade: Shade
) -> None:
    small = FakeSession(tokenizer, session._schema, image=session.image, context=100)
    with pytest.raises(SonoEdgeError, match=r"is \d{3} tokens long and the context holds 100"):
        Prompter(small, tokenizer).question([look_at(small, shade(0))], "long " * 30, "en")


def test_the_fake_refuses_wrong_positions_masks_and_lengths(session: FakeSession, prompt: Prompt) -> None:
    with pytest.raises(SonoEdgeError, match="stands at"):
        session.extend(prompt.ids, prompt.positions + 1, image_embeds=prompt.embeds)
    session.rewind(0)
    with pytest.raises(SonoEdgeError, match="rewound to 7"):
        session.rewind(7)
    with pytest.raises(SonoEdgeError, match="visible is not"):
        session.extend(prompt.ids, prompt.positions, image_embeds=prompt.embeds, visible=np.ones((2, 2), np.bool_))
