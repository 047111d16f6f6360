"""What the cache holds is run once: after hints, between turns, and never when it is about another picture."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from sonoedge.runtime.choices import score_choices
from sonoedge.runtime.client import Client
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.generate import Generation
from sonoedge.runtime.held_prefix import HeldPrefix
from sonoedge.runtime.look import Look, Looks, Prompter, look_at
from sonoedge.runtime.model import Model
from sonoedge.runtime.server import Server
from sonoedge.runtime.sessions.fake import FakeSession
from sonoedge.runtime.tokens import Tokenizer

Shade = Callable[..., Frame]


@pytest.fixture
def prompter(session: FakeSession, tokenizer: Tokenizer) -> Prompter:
    return Prompter(session, tokenizer)


@pytest.fixture
def looks(session: FakeSession, shade: Shade) -> list[Look]:
    return [look_at(session, shade(0)), look_at(session, shade(255))]


def test_a_prompt_shares_what_is_the_same_from_the_start(prompter: Prompter, looks: list[Look]) -> None:
    look, held = looks[0], HeldPrefix()
    prefix, prompt = prompter.prefix([look], "en"), prompter.question([look], "What?", "en")
    assert held.shared([look], prefix, prompt) == 0
    held.hold([look], prefix.ids)
    assert held.shared([look], prefix, prompt) == len(prefix.ids)
    held.hold([look], prompt.ids)
    assert held.shared([look], prefix, prompt) == len(prompt.ids) - 1  # one is left to run
    other = prompter.question([look], "Which?", "en")
    assert len(prefix.ids) <= held.shared([look], prefix, other) < len(other.ids) - 2
    held.forget()
    assert held.shared([look], prefix, prompt) == 0


def test_another_picture_or_language_shares_nothing(prompter: Prompter, looks: list[Look], shade: Shade) -> None:
    one, two = looks
    held = HeldPrefix()
    held.hold([one], prompter.question([one], "What?", "en").ids)
    assert held.shared([two], prompter.prefix([two], "en"), prompter.question([two], "What?", "en")) == 0
    assert held.shared(looks, prompter.prefix(looks, "en"), prompter.question(looks, "What?", "en")) == 0
    assert held.shared([one], prompter.prefix([one], "zh"), prompter.question([one], "What?", "zh")) == 0
    held.hold([one], prompter.prefix([one], "en").ids[:-1])
    assert held.shared([one], prompter.prefix([one], "en"), prompter.question([one], "What?", "en")) == 0


def test_an_answer_is_the_same_from_a_held_prefix(
    session: FakeSession, tokenizer: Tokenizer, prompter: Prompter, looks: list[Look]
) -> None:
    def run(held: int) -> list[int]:
        prompt = prompter.question([looks[1]], "What?", "en")
        generation = Generation(session, tokenizer, prompt, max_tokens=100, held=held)
        while generation.finish is None:
            generation.step()
        return generation.ids

    whole = run(0)
    prefix = prompter.prefix([looks[1]], "en")
    session.rewind(0)
    session.extend(prefix.ids, prefix.positions, image_embeds=prefix.embeds)
    assert run(len(prefix.ids)) == whole
    assert tokenizer.decode(whole) == "亮度 100 %: What?"


def test_what_is_cached_is_known_at_every_step(
    session: FakeSession, tokenizer: Tokenizer, prompter: Prompter, looks: list[Look]
) -> None:
    prompt = prompter.question([looks[0]], "What?", "en")
    generation = Generation(session, tokenizer, prompt, max_tokens=100)
    assert generation.cached_ids == []
    for steps in range(1, 4):
        generation.step()
        assert generation.cached_ids == [*prompt.ids.tolist(), *generation.ids[: steps - 1]]
        assert generation.cached_ids == session._ids
    generation.suspend()
    assert generation.cached_ids == []


def test_pictures_that_are_asked_about_are_encoded_once(session: FakeSession, shade: Shade) -> None:
    looks = Looks(session)
    frozen, live = shade(10), shade(20)
    first = looks.asked(frozen)
    seen = looks.newest(live)
    for number in range(10):
        looks.newest(shade(30 + number))
    assert looks.asked(frozen) is first
    assert looks.asked(live) is not seen  # nobody asked about it while it was the newest
    newest = looks.newest(shade(99))
    assert looks.asked(newest.frame) is newest


@pytest.mark.parametrize("brightness", [0, 128, 255])
def test_choices_get_the_probabilities_of_their_letters(
    session: FakeSession, tokenizer: Tokenizer, prompter: Prompter, shade: Shade, brightness: int
) -> None:
    look = look_at(session, shade(brightness))
    prompt = prompter.question([look], "Which? A. one B. two C. three", "en")
    shares = score_choices(session, tokenizer, prompt, "ABC")
    assert int(np.argmax(shares)) == min(int(brightness / 255 * 3), 2)
    assert shares.sum() == pytest.approx(1)
    assert session._ids == prompt.ids.tolist()
    held = len(prompter.prefix([look], "en").ids)
    assert score_choices(session, tokenizer, prompt, "ABC", held=held) == pytest.approx(shares)


def test_answers_of_several_tokens_are_scored_as_wholes(
    session: FakeSession, tokenizer: Tokenizer, prompter: Prompter, shade: Shade
) -> None:
    look = look_at(session, shade(0))
    prompt = prompter.question([look], "Is a lesion visible?", "en")
    shares = score_choices(session, tokenizer, prompt, ["yes", "yesterday", "no", "yes, no"])
    assert shares[0] > 0.99


def test_a_server_runs_the_pictures_tokens_once(
    make_source: Callable[..., Any], make_model: Callable[..., Model], start_server: Callable[..., Server]
) -> None:
    model = make_model()
    assert isinstance(model.session, FakeSession)
    with_pictures: list[int] = []
    extend = model.session.extend

    def counted(ids: Any, positions: Any, **options: Any) -> Any:
        if options.get("image_embeds") is not None:
            with_pictures.append(len(ids))
        return extend(ids, positions, **options)

    model.session.extend = counted  # type: ignore[method-assign]
    source = make_source(fps=10)
    server = start_server(source, model)
    source.silent = True
    time.sleep(0.3)  # after the hints of the last frame nothing else uses the cache
    assert with_pictures
    with_pictures.clear()
    with Client(server.requests_endpoint, timeout_s=20) as client:
        first = client.answer("What?")
        client.answer("And?", turns=[("What?", first.answer)])
        client.answer("Which?", choices=["a", "b"])
        client.answer("What?")
        assert with_pictures == []
        client.answer("What?", language="zh")
        assert len(with_pictures) == 1
