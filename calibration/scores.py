"""What a session says of labelled frames: every candidate's score, scored by the runtime's own hint engine."""

from __future__ import annotations

import time

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import Truth
from sonoedge.calibration.phantom_text import truth_fields
from sonoedge.calibration.pool import PhantomPool
from sonoedge.progress import track
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.hint_engine import HintEngine
from sonoedge.runtime.hints import HintSchema, load_schema
from sonoedge.runtime.look import look_at
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

SMALL_RADIUS_PX = 18.0  # at 224 pixels a side


class HintScores(msgspec.Struct, frozen=True):
    """One hint over the frames where its question has a right answer."""

    frames: npt.NDArray[np.int64]  # [n], rows of the pool
    scores: npt.NDArray[np.float32]  # [n, candidates], log-probabilities
    right: npt.NDArray[np.int64]  # [n], index of the right candidate

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        """Whether the likeliest candidate is right, [n]."""
        right: npt.NDArray[np.bool_] = self.scores.argmax(axis=1) == self.right
        return right

    def subset(self, kept: npt.NDArray[np.bool_]) -> HintScores:
        """The frames that `kept` [n] marks."""
        return HintScores(self.frames[kept], self.scores[kept], self.right[kept])


class ScoredFrames(msgspec.Struct, frozen=True):
    """A pool as one session saw it."""

    hints: dict[str, HintScores]
    mean_embeds: npt.NDArray[np.float32]  # [frames, hidden]
    truths: tuple[Truth, ...]

    def accuracy(self) -> dict[str, float]:
        """The fraction answered rightly of each question, and `overall`, their mean."""
        fractions = {name: float(hint.correct.mean()) for name, hint in self.hints.items()}
        return fractions | {"overall": float(np.mean(list(fractions.values())))}

    def strata(self) -> dict[str, dict[str, float]]:
        """Accuracy by image quality, and of lesion questions by lesion size; an empty stratum is left out."""
        small = np.array(
            [t.lesion is not None and t.lesion.radius_px * 224 / t.size < SMALL_RADIUS_PX for t in self.truths]
        )
        large = np.array([t.lesion is not None for t in self.truths]) & ~small
        poor = np.array([t.quality == "poor" for t in self.truths])
        groups = {"good frames": ~poor, "poor frames": poor, "small lesions": small, "large lesions": large}
        return {
            label: {
                name: float(h.correct[mask[h.frames]].mean()) for name, h in self.hints.items() if mask[h.frames].any()
            }
            for label, mask in groups.items()
        }


def score_pool(
    session: Session, tokenizer: Tokenizer, pool: PhantomPool, label: str, schema: HintSchema | None = None
) -> ScoredFrames:
    """Score every hint on every frame of the pool; the frames need not be seen by anything before."""
    schema = schema or load_schema()
    engine = HintEngine(session, tokenizer, schema)
    rows: dict[str, list[int]] = {hint.name: [] for hint in schema.hints}
    scores: dict[str, list[npt.NDArray[np.float32]]] = {hint.name: [] for hint in schema.hints}
    right: dict[str, list[int]] = {hint.name: [] for hint in schema.hints}
    embeds = []
    with track(label, len(pool)) as advance:
        for index in range(len(pool)):
            look = look_at(session, Frame(pool[index].rgb(), index, time.monotonic_ns(), None, "phantom"))
            embeds.append(look.embeds.mean(axis=0))
            fields = truth_fields(pool.truths[index])
            for name, value in engine.scores(look).items():
                answer = getattr(fields, name)
                if answer is not None:
                    rows[name].append(index)
                    scores[name].append(value)
                    right[name].append(schema.hint(name).candidate_ids().index(answer))
            advance(1)
    hints = {
        name: HintScores(np.array(rows[name], np.int64), np.stack(scores[name]), np.array(right[name], np.int64))
        for name in rows
        if rows[name]
    }
    return ScoredFrames(hints, np.stack(embeds), tuple(pool.truths))
