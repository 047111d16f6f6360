"""Scores of labelled frames: questions about a lesion only where there is one, and accuracy by stratum."""

from pathlib import Path

import numpy as np
import pytest

from sonoedge.calibration.phantom import KINDS, Lesion, Truth
from sonoedge.calibration.pool import PhantomPool
from sonoedge.calibration.scores import HintScores, ScoredFrames, score_pool
from sonoedge.export.evaluate import open_model
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.hint_engine import HintEngine
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.look import look_at


def truth(quality: str, radius_px: float | None) -> Truth:
    lesion = None if radius_px is None else Lesion("cyst", "left", radius_px, 9.0, 9.0, (50.0, 50.0))
    return Truth("liver", quality, "linear", 0.2, lesion, 0, 224)


def test_accuracy_and_strata() -> None:
    truths = (truth("good", None), truth("poor", 10.0), truth("good", 30.0), truth("poor", 17.9))
    region = HintScores(np.arange(4), np.eye(4, dtype=np.float32)[[0, 0, 1, 0]], np.array([0, 0, 1, 3]))
    kind = HintScores(np.array([1, 2, 3]), np.eye(4, dtype=np.float32)[[2, 2, 2]], np.array([2, 0, 2]))
    scored = ScoredFrames({"region": region, "kind": kind}, np.zeros((4, 2), np.float32), truths)
    assert scored.accuracy() == {
        "region": 0.75,
        "kind": pytest.approx(2 / 3),
        "overall": pytest.approx((0.75 + 2 / 3) / 2),
    }
    assert scored.strata() == {
        "good frames": {"region": 1.0, "kind": 0.0},
        "poor frames": {"region": 0.5, "kind": 1.0},
        "small lesions": {"region": 0.5, "kind": 1.0},
        "large lesions": {"region": 1.0, "kind": 0.0},
    }


def test_a_stratum_without_frames_is_left_out() -> None:
    region = HintScores(np.arange(1), np.eye(2, dtype=np.float32)[:1], np.array([0]))
    scored = ScoredFrames({"region": region}, np.zeros((1, 2), np.float32), (truth("good", None),))
    assert scored.strata() == {
        "good frames": {"region": 1.0},
        "poor frames": {},
        "small lesions": {},
        "large lesions": {},
    }


def test_scores_are_those_of_the_hint_engine(tiny_checkpoint: Path, frames: PhantomPool) -> None:
    session, tokenizer = open_model(tiny_checkpoint)
    few = PhantomPool(100, frames.greys[:6], frames.classes[:6], frames.truths[:6])
    scored = score_pool(session, tokenizer, few, "score")
    schema = load_schema()
    lesions = [index for index, t in enumerate(few.truths) if t.lesion is not None]
    assert 0 < len(lesions) < 6
    assert scored.hints["kind"].frames.tolist() == scored.hints["side"].frames.tolist() == lesions
    assert scored.hints["region"].frames.tolist() == list(range(6))
    assert scored.mean_embeds.shape == (6, 64)
    for row, index in enumerate(lesions):
        lesion = few.truths[index].lesion
        assert lesion is not None
        right = schema.hint("kind").candidate_ids()[scored.hints["kind"].right[row]]
        assert right == lesion.kind
        assert right in KINDS
    frame = Frame(few[3].rgb(), 0, 0, None, "test")
    look = look_at(session, frame)
    wanted = HintEngine(session, tokenizer, schema).scores(look)
    assert np.allclose(scored.hints["region"].scores[3], wanted["region"], atol=1e-5)
    assert np.allclose(scored.mean_embeds[3], look.embeds.mean(axis=0))
