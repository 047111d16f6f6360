"""The ONNX Runtime session on the smallest built bundle, beside the torch model that it was built from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.bundle import TOKENIZER_FILE, open_bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.export.models import rope
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.generate import Generation, generate
from sonoedge.runtime.hint_engine import HintEngine
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.look import Prompt, Prompter, look_at
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.sessions.ort import OrtSession, open_session, patch_places
from sonoedge.runtime.tokens import Tokenizer


@pytest.fixture
def ort(tiny: Any) -> Iterator[OrtSession]:
    """The bundle's session, its cache empty."""
    session = open_session(open_bundle(tiny.bundle), threads=1)
    yield session
    session.close()


@pytest.fixture
def one_form(tiny: Any) -> Iterator[OrtSession]:
    """The same without the graph for one token at a time, as where memory is short."""
    bundle = open_bundle(tiny.bundle)
    vision, decoder = (bundle.graph(purpose, "ort") for purpose in ("vision", "decoder"))
    session = OrtSession(vision, decoder, bundle.manifest.image, bundle.manifest.decoder, threads=1)
    yield session
    session.close()


@pytest.fixture
def tiny_tokenizer(tiny: Any) -> Tokenizer:
    return Tokenizer.from_file(tiny.bundle / TOKENIZER_FILE)


@pytest.fixture
def frame(noise: Any) -> Frame:
    return Frame(noise(120, 160), 0, 0, None, "test")


def question(session: Session, tokenizer: Tokenizer, frame: Frame) -> Prompt:
    look = look_at(session, frame)
    return Prompter(session, tokenizer).question([look], "Which region is shown?", "en")


def relative(found: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_int8_stays_near_the_float_model(tiny: Any, ort: OrtSession, tiny_tokenizer: Tokenizer, frame: Frame) -> None:
    torch_session = TorchSession(load_checkpoint(tiny.checkpoint), ort.image, ort.spec.context)
    assert torch_session.spec == ort.spec
    outputs = []
    for session in (ort, torch_session):
        prompt = question(session, tiny_tokenizer, frame)
        rows = np.arange(len(prompt.ids))
        outputs.append(session.extend(prompt.ids, prompt.positions, image_embeds=prompt.embeds, logits_rows=rows))
    error = relative(*outputs)
    print("relative error:", error)
    assert 1e-6 < error < 0.2
    sessions: tuple[Session, ...] = (ort, torch_session)
    engines = [HintEngine(session, tiny_tokenizer, load_schema()) for session in sessions]
    hints = [engine.scores(look_at(session, frame)) for engine, session in zip(engines, sessions, strict=True)]
    assert hints[0].keys() == hints[1].keys()
    for name, scores in hints[0].items():
        assert relative(scores, hints[1][name]) < 0.1, name


def in_pieces(session: OrtSession, prompt: Prompt, first: int, tokens: int) -> npt.NDArray[np.float32]:
    """Logits from the end of the picture on, so many tokens at a time behind it."""
    ids, positions = prompt.ids, prompt.positions
    parts = [session.extend(ids[:first], positions[:, :first], image_embeds=prompt.embeds)]
    for start in range(first, len(ids), tokens):
        part = slice(start, start + tokens)
        rows = np.arange(len(ids[part]))
        parts.append(session.extend(ids[part], positions[:, part], logits_rows=rows))
    return np.concatenate(parts)


@pytest.mark.parametrize(("form", "tokens", "bound"), [("one", 1, 0.02), ("both", 2, 0.02), ("both", 1, 0.15)])
def test_pieces_give_what_one_pass_gives(
    ort: OrtSession, one_form: OrtSession, tiny_tokenizer: Tokenizer, frame: Frame, form: str, tokens: int, bound: float
) -> None:
    """One level of an int8 activation may fall to the other side when sums are formed in another order.

    A single token in the graph of its own is another computation: activations are not rounded where calibration said.
    """
    session = ort if form == "both" else one_form
    prompt = question(session, tiny_tokenizer, frame)
    ids, positions = prompt.ids, prompt.positions
    whole = session.extend(ids, positions, image_embeds=prompt.embeds, logits_rows=np.arange(len(ids)))
    session.rewind(0)
    first = 1 + int(np.flatnonzero(ids == session.spec.image_token_id)[-1])
    first += (len(ids) - first) % tokens  # no piece is shorter
    error = relative(in_pieces(session, prompt, first, tokens), whole[first - 1 :])
    print("relative error:", error)
    assert error < bound


def test_a_rewound_cache_forgets(
    ort: OrtSession, one_form: OrtSession, tiny_tokenizer: Tokenizer, frame: Frame
) -> None:
    """Not a bit is left of what stood there: in one graph, and in two that take turns."""
    for session in (one_form, ort):
        prompt = question(session, tiny_tokenizer, frame)
        ids, positions = prompt.ids, prompt.positions
        whole = session.extend(ids, positions, image_embeds=prompt.embeds)
        length = len(ids)
        assert session.length == length
        session.rewind(length - 1)
        wanted = session.extend(ids[-1:], positions[:, -1:])
        if session is one_form:
            assert np.array_equal(wanted, whole)
        for count in (1, 9):
            strange = np.full(count, 65, np.int64)
            session.rewind(length - 1)
            session.extend(strange, np.tile(np.arange(count) + prompt.next_position, (3, 1)))
            session.rewind(length - 1)
            assert np.array_equal(session.extend(ids[-1:], positions[:, -1:]), wanted)
        for wrong in (-1, length + 1):
            with pytest.raises(SonoEdgeError, match=rf"holds {length} tokens and cannot be rewound to {wrong}"):
                session.rewind(wrong)


def test_a_full_context_is_refused_and_nothing_is_lost(
    ort: OrtSession, tiny_tokenizer: Tokenizer, frame: Frame
) -> None:
    prompt = question(ort, tiny_tokenizer, frame)
    ort.extend(prompt.ids, prompt.positions, image_embeds=prompt.embeds)
    length, context = ort.length, ort.spec.context
    too_many = np.full(context - length + 1, 65, np.int64)
    positions = np.tile(np.arange(len(too_many)) + prompt.next_position, (3, 1))
    with pytest.raises(SonoEdgeError, match=rf"{context + 1} tokens do not fit the context of {context}"):
        ort.extend(too_many, positions)
    assert ort.length == length
    filled = ort.extend(too_many[1:], positions[:, 1:])
    assert ort.length == context
    assert np.isfinite(filled).all()


def test_images_and_image_tokens_must_match(ort: OrtSession, tiny_tokenizer: Tokenizer, frame: Frame) -> None:
    prompt = question(ort, tiny_tokenizer, frame)
    merged = len(prompt.embeds)
    with pytest.raises(SonoEdgeError, match=rf"holds {merged} image tokens but the images give {merged - 1}"):
        ort.extend(prompt.ids, prompt.positions, image_embeds=prompt.embeds[1:])
    assert ort.length == 0


def test_answers_are_generated(ort: OrtSession, tiny_tokenizer: Tokenizer, frame: Frame) -> None:
    prompt = question(ort, tiny_tokenizer, frame)
    texts = ["".join(generate(ort, tiny_tokenizer, prompt, max_tokens=40)) for _ in range(2)]
    assert texts[0] == texts[1]


def test_an_answer_never_holds_an_image_token(ort: OrtSession, tiny_tokenizer: Tokenizer, frame: Frame) -> None:
    """A random model likes to say it; run again after a pause, the prompt would hold more image tokens than images."""
    prompt = question(ort, tiny_tokenizer, frame)
    image_token = ort.spec.image_token_id
    logits = ort.extend(prompt.ids, prompt.positions, image_embeds=prompt.embeds)[0]
    generation = Generation(ort, tiny_tokenizer, prompt, max_tokens=40)
    for _ in range(40):
        generation.step()
        generation.suspend()
    assert len(generation.ids) == 40
    assert image_token not in generation.ids
    logits[image_token] = -np.inf
    assert generation.ids[0] == logits.argmax()


@pytest.mark.parametrize("grid", [(1, 4, 6), (2, 6, 2), (1, 2, 2)])
def test_patch_places_are_those_of_the_torch_model(grid: tuple[int, int, int]) -> None:
    import torch

    assert np.array_equal(patch_places(grid, 2), rope.patch_places(grid, 2, torch.device("cpu")).numpy())


def test_a_graph_that_is_none_is_refused(tiny: Any, tmp_path: Path) -> None:
    bundle = open_bundle(tiny.bundle)
    broken = tmp_path / "vision.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(SonoEdgeError, match=r"onnxruntime [\d.]+ cannot load vision\.onnx .* build the bundle again"):
        OrtSession(broken, broken, bundle.manifest.image, bundle.manifest.decoder, threads=1)
