"""Samples from phantoms and from conversation files, and the batches made of them."""

from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch

from sonoedge.calibration.conversations import write_phantom_conversations
from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.corpus import Batch, Batches, ConversationCorpus, PhantomCorpus, open_corpus
from sonoedge.export.lessons import branches
from sonoedge.export.packing import IGNORE
from sonoedge.export.possible_answers import possible_branches
from sonoedge.runtime.hints import LANGUAGES, load_schema
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

SPEC = ImageSpec(max_pixels=84 * 84)


def write_cases(folder: Path, cases: list[tuple[list[tuple[int, int]], list[tuple[str, str]]]]) -> Path:
    """Write a conversation file: for each case the (height, width) of its pictures and its questions and answers."""
    entries = []
    for number, (sizes, exchanges) in enumerate(cases):
        names: list[str] = []
        for height, width in sizes:
            name = f"{number}_{len(names)}.png"
            picture = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
            assert cv2.imwrite(str(folder / name), picture)
            names.append(name)
        turns = [{"from": "system", "value": "You are an ultrasound assistant."}]
        for index, (question, answer) in enumerate(exchanges):
            marks = "<image>\n" * len(names) if index == 0 else ""
            turns += [{"from": "human", "value": marks + question}, {"from": "gpt", "value": answer}]
        entries.append({"id": number, "image": names, "conversations": turns})
    path = folder / "cases.json"
    path.write_bytes(msgspec.json.encode(entries))
    return path


def equal(first: Batch, second: Batch) -> bool:
    pairs = zip(msgspec.structs.astuple(first.packed), msgspec.structs.astuple(second.packed), strict=True)
    return (
        first.grids == second.grids
        and torch.equal(first.patches, second.patches)
        and all(torch.equal(*p) for p in pairs)
    )


def test_batches_depend_on_seed_and_step_alone(frames: PhantomPool, tiny_tokenizer: Tokenizer) -> None:
    def batch(seed: int, step: int) -> Batch:
        corpus = PhantomCorpus(frames, SPEC)
        return Batches(corpus, tiny_tokenizer, SPEC, size=4, seed=seed, context=640).batch(step)

    first = batch(1, 5)
    assert first.patches.shape == (4 * 36, 1176)
    assert first.grids == [(1, 6, 6)] * 4
    assert equal(first, batch(1, 5))
    assert not equal(first, batch(1, 6))
    assert not equal(first, batch(2, 5))
    numbered = Batches(PhantomCorpus(frames, SPEC), tiny_tokenizer, SPEC, size=4, seed=1, context=640).steps(4, 7)
    steps, batches = zip(*numbered, strict=True)
    assert steps == (4, 5, 6)
    assert equal(batches[1], first)


def test_phantoms_come_mirrored_half_of_the_time(frames: PhantomPool) -> None:
    corpus = PhantomCorpus(frames, SPEC)
    plain = frames[0].patches(SPEC).values
    turned = frames.mirrored(0).patches(SPEC).values
    kinds = []
    for seed in range(60):
        values = corpus.sample(0, np.random.default_rng(seed)).images[0].values
        kinds.append((np.array_equal(values, plain), np.array_equal(values, turned)))
    assert set(kinds) == {(True, False), (False, True)}
    assert 15 < sum(is_plain for is_plain, _ in kinds) < 45


def test_lessons_of_a_mirrored_lesion_name_the_other_side(frames: PhantomPool) -> None:
    index = next(i for i, t in enumerate(frames.truths) if t.lesion is not None)
    answers = []
    for frame in (frames[index], frames.mirrored(index)):
        drawn = branches(frame.truth, np.random.default_rng(3))
        answers.append({branch.name: branch.answer for branch in drawn})
    assert answers[0]["side"] != answers[1]["side"]
    assert answers[0]["kind"] == answers[1]["kind"]
    assert set(answers[0]) >= {"region", "quality", "finding", "kind", "side"}


def test_lessons_use_both_languages_and_reports_now_and_then(frames: PhantomPool) -> None:
    drawn = [b for seed in range(40) for b in branches(frames.truths[0], np.random.default_rng(seed))]
    assert {branch.question.isascii() for branch in drawn} == {True, False}
    assert 4 <= sum(branch.name == "report" for branch in drawn) <= 22


def test_a_case_keeps_its_images_and_loses_their_marks(tmp_path: Path) -> None:
    path = write_cases(tmp_path, [([(60, 90), (120, 60)], [("What is it?", "A cyst."), ("Which side?", "Left.")])])
    corpus = ConversationCorpus(path, SPEC)
    sample = corpus.sample(0, np.random.default_rng(0))
    assert [image.grid for image in sample.images] == [(1, 4, 6), (1, 8, 4)]
    assert [(branch.question, branch.answer) for branch in sample.branches] == [
        ("What is it?", "A cyst."),
        ("Which side?", "Left."),
    ]


def test_a_batch_holds_images_of_one_shape(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    wide, tall, pair = [(60, 90)], [(120, 60)], [(60, 90), (120, 60)]
    cases = [(sizes, [("Which?", f"Answer {n}.")]) for n, sizes in enumerate([wide, tall, pair] * 2)]
    corpus = ConversationCorpus(write_cases(tmp_path, cases), SPEC)
    batches = Batches(corpus, tiny_tokenizer, SPEC, size=3, seed=2, context=200)
    seen = set()
    for _, batch in batches.steps(0, 20):
        samples = batch.packed.input_ids.shape[0]
        assert 1 <= samples <= 3
        per_sample = len(batch.grids) // samples
        shapes = batch.grids[:per_sample]
        assert batch.grids == shapes * samples
        assert batch.patches.shape[0] == sum(h * w for _, h, w in batch.grids)
        image_tokens = int((batch.packed.input_ids == tiny_tokenizer.image_pad).sum())
        assert image_tokens == batch.patches.shape[0] // 4
        assert (batch.packed.labels != IGNORE).any(dim=1).all()
        seen.add(tuple(shapes))
    assert seen == {((1, 4, 6),), ((1, 8, 4),), ((1, 4, 6), (1, 8, 4))}


def test_a_case_without_image_is_refused(tmp_path: Path) -> None:
    path = write_cases(tmp_path, [([(60, 60)], [("Q?", "A.")]), ([], [("Q?", "A.")])])
    with pytest.raises(SonoEdgeError, match=r"cases.json: case 1 has no image: add one"):
        ConversationCorpus(path, SPEC)


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    path = write_cases(tmp_path, [([(60, 60)], [("Q?", "A.")])])
    (tmp_path / "0_0.png").write_bytes(b"no picture")
    with pytest.raises(SonoEdgeError, match=r"0_0.png is not a picture that can be read"):
        ConversationCorpus(path, SPEC).sample(0, np.random.default_rng(0))


def test_corpora_are_opened_by_name(tmp_path: Path, frames: PhantomPool) -> None:
    path = write_cases(tmp_path, [([(60, 60)], [("Q?", "A.")])])
    conversations = open_corpus(str(path), SPEC, None)
    assert (len(conversations), conversations.answered) == (1, True)
    assert conversations.files == (path, tmp_path / "0_0.png")
    phantoms = open_corpus("phantoms", SPEC, frames)
    assert (len(phantoms), phantoms.answered, phantoms.files) == (len(frames), True, ())
    pictures = open_corpus(str(tmp_path), SPEC, None)
    assert (len(pictures), pictures.answered, pictures.files) == (1, False, (tmp_path / "0_0.png",))
    with pytest.raises(SonoEdgeError, match=r"nowhere.json cannot be read"):
        open_corpus(str(tmp_path / "nowhere.json"), SPEC, None)
    with pytest.raises(SonoEdgeError, match=r"nowhere does not exist: name a conversation file"):
        open_corpus(str(tmp_path / "nowhere"), SPEC, None)


def test_regions_are_known_of_phantoms_alone(tmp_path: Path, frames: PhantomPool) -> None:
    rng = np.random.default_rng(0)
    phantoms = PhantomCorpus(frames, SPEC)
    for index in range(5):
        assert phantoms.sample(index, rng).region == frames.truths[index].region
    written = ConversationCorpus(write_phantom_conversations(tmp_path / "written", [100], ["en"]), SPEC)
    assert written.sample(0, rng).region == frames.truths[0].region
    path = write_cases(tmp_path, [([(60, 60)], [("Q?", "A.")])])
    assert ConversationCorpus(path, SPEC).sample(0, rng).region is None
    assert open_corpus(str(tmp_path / "0_0.png"), SPEC, None).sample(0, rng).region is None


def test_frames_meet_every_hint_and_every_answer_in_both_languages() -> None:
    schema = load_schema()
    wanted = {
        (hint.question.get(language), candidate.text.get(language))
        for language in LANGUAGES
        for hint in schema.hints
        for candidate in hint.candidates
    }
    asked = [branch for index in range(32) for branch in possible_branches(index, np.random.default_rng(index))]
    assert {(branch.question, branch.answer) for branch in asked if branch.name != "report"} == wanted
    reports = [branch for branch in asked if branch.name == "report"]
    assert len(reports) == 32
    assert sum(branch.answer.isascii() for branch in reports) == 16
    assert all(len(branch.answer) > 10 for branch in reports)


def test_frames_of_a_folder_are_asked_in_turn(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    write_cases(tmp_path, [([(60, 90)], [("Q?", "A.")]) for _ in range(3)])
    (tmp_path / "cases.json").unlink()
    corpus = open_corpus(str(tmp_path), SPEC, None)
    samples = [corpus.sample(index, np.random.default_rng(index)) for index in range(3)]
    assert samples[0].name == str(tmp_path / "0_0.png")
    assert [sample.branches[0].question.isascii() for sample in samples] == [True, False, True]
    again = corpus.sample(1, np.random.default_rng(1))
    assert again.branches == samples[1].branches
    assert np.array_equal(again.images[0].values, samples[1].images[0].values)
    batch = Batches(corpus, tiny_tokenizer, SPEC, size=1, seed=0, context=512).collate(((1, 4, 6),), samples[:1])
    assert batch.packed.input_ids.shape[1] < 512


def test_a_case_longer_than_the_context_is_named(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    cases = [([(60, 60)], [("Q?", "A short answer." * length)]) for length in (1, 30, 2)]
    corpus = ConversationCorpus(write_cases(tmp_path, cases), SPEC)
    batches = Batches(corpus, tiny_tokenizer, SPEC, size=3, seed=0, context=120)
    samples = [corpus.sample(index, np.random.default_rng(0)) for index in range(3)]
    grids = (samples[0].images[0].grid,)
    batches.collate(grids, [samples[0], samples[2]])
    wanted = rf"^case 1 of {tmp_path / 'cases.json'}: a sample .* has \d+ tokens and limits\.context = 120: raise it"
    for some in (samples, samples[1:2]):
        with pytest.raises(SonoEdgeError, match=wanted):
            batches.collate(grids, some)


def test_a_picture_that_is_too_thin_is_named(tmp_path: Path) -> None:
    path = write_cases(tmp_path, [([(1, 300)], [("Q?", "A.")])])
    for data in (path, tmp_path):
        with pytest.raises(SonoEdgeError, match=r"0_0\.png: the picture is 300x1 pixels"):
            open_corpus(str(data), SPEC, None).sample(0, np.random.default_rng(0))


def test_a_labelled_folder_teaches_its_classes_and_calibrates_as_frames(tmp_path: Path) -> None:
    for name in ("benign/a.png", "malignant/b.png"):
        (tmp_path / name).parent.mkdir()
        cv2.imwrite(str(tmp_path / name), np.full((60, 90, 3), 80, np.uint8))
    corpus = open_corpus(str(tmp_path), SPEC, None, labelled=True)
    assert (len(corpus), corpus.answered) == (2, True)
    assert [path.name for path in corpus.files] == ["a.png", "b.png"]
    samples = [corpus.sample(index, np.random.default_rng(0)) for index in range(2)]
    assert [branch.answer for sample in samples for branch in sample.branches] == ["A", "B"]
    assert "A. benign B. malignant" in samples[0].branches[0].question
    assert not open_corpus(str(tmp_path), SPEC, None).answered
