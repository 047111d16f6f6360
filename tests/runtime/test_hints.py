"""Hints: the schema file, the token tree, the scores against one-by-one scoring, abstention."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.bundle import HintCalibration, ImageSpec
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.familiarity import Familiarity, load_familiarity
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.hint_engine import LOW_CONFIDENCE, UNSEEN, HintEngine, poor_frame
from sonoedge.runtime.hint_layout import lay_out
from sonoedge.runtime.hints import HintSchema, load_schema
from sonoedge.runtime.look import Prompter, look_at
from sonoedge.runtime.model import Model
from sonoedge.runtime.prompt import answer_ids
from sonoedge.runtime.sessions.fake import FakeSession
from sonoedge.runtime.tokens import Tokenizer

Shade = Callable[..., Frame]
MakeModel = Callable[..., Model]

SCHEMA = """
version = 1
[[hint]]
name = "a"
question = { en = "A?", zh = "甲？" }
candidates = [{ id = "x", en = "x", zh = "一" }, { id = "y", en = "y", zh = "二" }]
"""


class NoisySession(FakeSession):
    """A fake whose logits differ in every row, by the tokens that the row sees."""

    def _next(self, seen: Sequence[int]) -> int:
        self.paths.append(tuple(self._ids[token] for token in seen))
        return 0

    def extend(self, *arguments: object, **options: object) -> npt.NDArray[np.float32]:
        self.paths: list[tuple[int, ...]] = []
        logits = super().extend(*arguments, **options)  # type: ignore[arg-type]
        for row, path in zip(logits, self.paths, strict=True):
            row[:] = np.random.default_rng(abs(hash(path))).normal(size=len(row)) * 3
        return logits


def test_packaged_schema_is_complete() -> None:
    schema = load_schema()
    assert [hint.name for hint in schema.hints] == ["region", "quality", "finding", "kind", "side"]
    assert schema.hint("finding").candidate_ids() == ("present", "absent")
    with pytest.raises(SonoEdgeError, match="'colour'"):
        schema.hint("colour")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version = 1", "version = 2"), "version 2 is not 1"),
        (("question", "qestion"), r"qestion|question"),
        (('id = "y"', 'id = "x"'), "candidates"),
        (('name = "a"', 'name = "a"\nask_when = { hint = "b", is = "x" }'), "waits for b = x"),
        (('zh = "二"', "zh = 2"), "candidates"),
        (("[[hint]]", "[[hint"), "wrong"),
        (('name = "a"', 'name = "a"\nvalid_ms = 0'), "valid_ms"),
    ],
)
def test_a_wrong_schema_is_refused_by_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "schema.toml"
    path.write_text(SCHEMA)
    assert load_schema(path).hints[0].name == "a"
    path.write_text(SCHEMA.replace(*change))
    with pytest.raises(SonoEdgeError, match=message):
        load_schema(path)


def test_a_schema_asks_each_hint_once(tmp_path: Path) -> None:
    path = tmp_path / "schema.toml"
    path.write_text(SCHEMA + SCHEMA.replace("version = 1", ""))
    with pytest.raises(SonoEdgeError, match="appears twice"):
        load_schema(path)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_scores_equal_scoring_candidates_one_by_one(
    tokenizer: Tokenizer, schema: HintSchema, shade: Shade, language: str
) -> None:
    session = NoisySession(tokenizer, schema, image=ImageSpec(max_pixels=56 * 56))
    look = look_at(session, shade(90))
    scores = HintEngine(session, tokenizer, schema, language=language).scores(look)
    prompter = Prompter(session, tokenizer)
    assert session.length == len(prompter.prefix([look], "en").ids)  # the cache is back at the prefix
    for hint in schema.hints:
        for candidate, score in zip(hint.candidates, scores[hint.name], strict=True):
            prompt = prompter.question([look], hint.question.get(language), "en")
            answer = answer_ids(tokenizer, candidate.text.get(language))
            session.rewind(0)
            positions = np.arange(len(answer) - 1) + prompt.next_position
            logits = session.extend(
                np.append(prompt.ids, np.array(answer[:-1], np.int64)),
                np.concatenate([prompt.positions, np.broadcast_to(positions, (3, len(positions)))], axis=1),
                image_embeds=prompt.embeds,
                logits_rows=np.arange(len(answer)) + len(prompt.ids) - 1,
            ).astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            assert score == pytest.approx(log_p[np.arange(len(answer)), answer].sum(), abs=1e-3)


def test_the_tree_keeps_branches_apart(tokenizer: Tokenizer, schema: HintSchema) -> None:
    layout = lay_out(schema, tokenizer, "en")
    assert layout.visible.diagonal().all()
    assert not np.triu(layout.visible, 1).any()
    # every token sees exactly the tokens of its own path, whose length is its offset
    np.testing.assert_array_equal(layout.visible.sum(axis=1), layout.offsets + 1)
    assert len(layout.rows) == len(set(layout.rows.tolist()))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_answers_in_both_languages(tokenizer: Tokenizer, schema: HintSchema, shade: Shade, language: str) -> None:
    session = FakeSession(tokenizer, schema, image=ImageSpec(max_pixels=56 * 56))
    engine = HintEngine(session, tokenizer, schema, language=language)
    dark, bright = engine.hints(shade(0)), engine.hints(shade(255))
    assert [hint.answer for hint in dark] == ["breast", "good", "present", "cyst", "left"]
    assert [hint.answer for hint in bright] == ["vessel", "poor", "absent"]  # kind and side are not asked
    assert dark[0].text is not None
    assert (dark[0].text.en, dark[0].text.zh) == ("breast", "乳腺")
    for hint in (*dark, *bright):
        assert hint.probability > 0.99
        assert sum(hint.candidates.values()) == pytest.approx(1)
        assert not hint.abstain


def test_a_feed_that_changes_size_keeps_its_hints(tokenizer: Tokenizer, schema: HintSchema, shade: Shade) -> None:
    engine = HintEngine(FakeSession(tokenizer, schema), tokenizer, schema)
    for size in ((60, 80), (120, 90), (60, 80), (28, 300)):
        assert [hint.answer for hint in engine.hints(shade(255, 0, size))] == ["vessel", "poor", "absent"]


def test_temperature_and_threshold_make_it_abstain(make_model: MakeModel, shade: Shade) -> None:
    calibration = {"region": HintCalibration(temperature=40.0, abstain_below=0.5)}
    region, quality, *_ = make_model(calibration=calibration).engine.hints(shade(0))
    assert (region.abstain, region.reason, region.answer, region.text) == (True, LOW_CONFIDENCE, None, None)
    assert 1 / 7 < region.probability < 0.5
    assert max(region.candidates, key=lambda name: region.candidates[name]) == "breast"
    assert not quality.abstain


def test_a_calibrated_hint_carries_its_set(make_model: MakeModel, shade: Shade) -> None:
    calibration = {
        "region": HintCalibration(temperature=40.0, coverage=0.9, set_floor=0.5, set_floors={"good": 0.1}),
        "quality": HintCalibration(coverage=0.9, set_floor=0.5),
    }
    dark = {hint.hint: hint for hint in make_model(calibration=calibration).engine.hints(shade(0))}
    assert dark["quality"].answer == "good"  # so the region's set takes the floor of good frames
    inside = [name for name, share in dark["region"].candidates.items() if share >= 0.1]
    assert len(inside) > 1
    assert dark["region"].set[0] == dark["region"].answer
    assert set(dark["region"].set) == set(inside)
    assert (dark["quality"].set, dark["quality"].coverage) == (("good",), 0.9)
    assert (dark["finding"].set, dark["finding"].coverage) == ((), None)
    bright = {hint.hint: hint for hint in make_model(calibration=calibration).engine.hints(shade(255))}
    assert bright["region"].set == (bright["region"].answer,)  # never empty, though no share reaches one half


def test_a_picture_of_an_unseen_kind_is_promised_nothing(make_model: MakeModel, shade: Shade) -> None:
    far = Familiarity(np.full(8, 9.0, np.float32), np.eye(8, dtype=np.float32), 0.1)
    model = make_model(familiarity=far, calibration={"region": HintCalibration(coverage=0.9)})
    region = model.engine.hints(shade(0))[0]
    assert (region.reason, region.set, region.coverage) == (UNSEEN, (), None)


def test_vector_scaling_and_platt_reach_the_hints(make_model: MakeModel, shade: Shade) -> None:
    (plain, *_) = make_model(calibration={"quality": HintCalibration()}).engine.hints(shade(0))[1:]
    scaled = HintCalibration(scale=(0.01, 0.01), shift=(0.0, 1.0))
    (moved, *_) = make_model(calibration={"quality": scaled}).engine.hints(shade(0))[1:]
    assert (plain.answer, moved.answer) == ("good", "poor")
    (line, *_) = make_model(calibration={"quality": HintCalibration(platt=(0.0, 1.0))}).engine.hints(shade(0))[1:]
    assert line.answer == "good"
    assert line.probability == pytest.approx(1 / (1 + np.exp(-1)))


def test_a_poor_frame_gets_no_answer_and_says_why(schema: HintSchema) -> None:
    hints = poor_frame(schema, "in air")
    assert [hint.hint for hint in hints] == ["region", "quality", "finding"]
    assert {(hint.answer, hint.abstain, hint.reason) for hint in hints} == {(None, True, "poor frame: in air")}


def test_a_hint_that_abstains_asks_no_other(make_model: MakeModel, shade: Shade) -> None:
    calibration = {"finding": HintCalibration(abstain_below=1.1)}
    hints = make_model(calibration=calibration).engine.hints(shade(0))
    assert [hint.hint for hint in hints] == ["region", "quality", "finding"]


def test_unseen_pictures_get_no_answer(make_model: MakeModel, shade: Shade, tmp_path: Path) -> None:
    Familiarity(np.full(8, 0.5, np.float32), np.eye(8, dtype=np.float32), 0.6).save(tmp_path / "known.npz")
    familiarity = load_familiarity(tmp_path / "known.npz")
    engine = make_model(familiarity=familiarity).engine
    assert not any(hint.abstain for hint in engine.hints(shade(128)))
    unseen = engine.hints(shade(0))
    assert [hint.reason for hint in unseen] == [UNSEEN] * 3
    assert all(hint.answer is None and hint.candidates for hint in unseen)


def test_a_wrong_familiarity_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "known.npz"
    for content in (b"", b"no npz", b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(SonoEdgeError, match="build the bundle again"):
            load_familiarity(path)
    np.savez(path, mean=np.zeros(3), whitening=np.zeros((4, 4)), threshold=1.0)
    with pytest.raises(SonoEdgeError, match=r"mean \[3\]"):
        load_familiarity(path)
    np.savez(path, mean=np.array([object()], dtype=object), whitening=np.zeros((1, 1)), threshold=1.0)
    with pytest.raises(SonoEdgeError, match="build the bundle again"):
        load_familiarity(path)
    mean, whitening = np.zeros(4), np.zeros((4, 2))
    for within in (np.eye(3), np.eye(2)):
        np.savez(
            path, mean=mean, whitening=whitening, threshold=1.0, centres=np.zeros((3, len(within) + 1)), within=within
        )
        with pytest.raises(SonoEdgeError, match="centres and within that do not fit 2 directions"):
            load_familiarity(path)
    np.savez(path, mean=mean, whitening=whitening, threshold=1.0, centres=np.zeros((3, 2)))
    with pytest.raises(SonoEdgeError, match="centres and within that do not fit 2 directions"):
        load_familiarity(path)
    np.savez(path, mean=mean, whitening=whitening, threshold=1.0)  # as it was written before regions were told apart
    assert load_familiarity(path).centres is None
    with pytest.raises(SonoEdgeError, match="build the bundle again"):
        load_familiarity(tmp_path / "none.npz")


def test_calibration_of_an_unknown_hint_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(SonoEdgeError, match="colour"):
        make_model(calibration={"colour": HintCalibration()})


def test_a_context_too_small_for_the_hints_is_refused(make_model: MakeModel, shade: Shade) -> None:
    with pytest.raises(SonoEdgeError, match="context holds 100"):
        make_model(context=100).engine.hints(shade(0))
