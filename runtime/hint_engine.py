"""Hints by scoring: the image prefix is run once, then every candidate answer of every question in one pass."""

from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.bundle import HintCalibration
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.familiarity import Familiarity
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.hint_layout import lay_out
from sonoedge.runtime.hint_probability import may_be_right, probabilities
from sonoedge.runtime.hints import VALID_MS, HintSchema, HintSpec, Text
from sonoedge.runtime.look import Look, Prompter, look_at
from sonoedge.runtime.prompt import HINT_LANGUAGE
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

LOW_CONFIDENCE = "low confidence"
UNSEEN = "unseen kind of image"
POOR_FRAME = "poor frame"
STALE_FRAME = "stale frame"
QUALITY = "quality"  # the hint by whose answer the sets of the others may differ


class HintResult(msgspec.Struct, frozen=True):
    """One hint about one frame; `answer` and `text` are None when it abstains; `probability` is of the likeliest."""

    hint: str
    answer: str | None
    text: Text | None
    probability: float
    abstain: bool
    reason: str | None
    candidates: dict[str, float]  # probability of each
    set: tuple[
        str, ...
    ] = ()  # candidates, the likeliest first, that hold the right one in a share `coverage` of frames
    coverage: float | None = None  # None: no set was calibrated
    valid_ms: int = VALID_MS  # from capture on
    abstain_below: float = 0.0


class HintEngine:
    """Answers every question of a schema about a frame; uses its session's cache from the start."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        schema: HintSchema,
        *,
        calibration: Mapping[str, HintCalibration] | None = None,
        familiarity: Familiarity | None = None,
        language: str = HINT_LANGUAGE,
    ) -> None:
        """Lay the schema out once; raises SonoEdgeError when calibration names a hint that the schema lacks."""
        self.schema = schema
        self._session = session
        self._prompter = Prompter(session, tokenizer)
        self._familiarity = familiarity
        self._calibration = {hint.name: HintCalibration() for hint in schema.hints} | dict(calibration or {})
        if unknown := set(self._calibration) - {hint.name for hint in schema.hints}:
            raise SonoEdgeError(
                f"hint_calibration names {sorted(unknown)}, which the schema lacks: build the bundle again"
            )
        self._layout = lay_out(schema, tokenizer, language)
        self._visible = np.empty((0, 0), np.bool_)  # of the last prefix length

    def hints(self, frame: Frame) -> list[HintResult]:
        """Look at a frame and return its hints, those whose `ask_when` fails left out."""
        return self.judge(look_at(self._session, frame))

    def is_unseen(self, look: Look) -> bool:
        """Whether the picture is of a kind that the model does not know; False where nobody measured that."""
        return self._familiarity is not None and self._familiarity.is_unseen(look.embeds)

    def judge(self, look: Look) -> list[HintResult]:
        """Return the hints about a frame that has been looked at."""
        unseen = self.is_unseen(look)
        scores = self.scores(look)
        quality = self._quality(scores)
        results: dict[str, HintResult] = {}
        for hint in self.schema.hints:
            condition = hint.ask_when
            if condition and (condition.hint not in results or results[condition.hint].answer != condition.answer):
                continue
            results[hint.name] = _result(hint, scores[hint.name], self._calibration[hint.name], quality, unseen=unseen)
        return list(results.values())

    def _quality(self, scores: Mapping[str, npt.NDArray[np.float32]]) -> str | None:
        if QUALITY not in scores:
            return None
        return self.schema.hint(QUALITY).candidate_ids()[int(np.argmax(scores[QUALITY]))]

    def scores(self, look: Look) -> dict[str, npt.NDArray[np.float32]]:
        """Return the log-probability of every candidate [candidates] of every hint, before calibration."""
        session, layout = self._session, self._layout
        prefix = self._prompter.prefix([look], HINT_LANGUAGE)
        length, total = len(prefix.ids), len(prefix.ids) + len(layout.ids)
        if total > session.spec.context:
            raise SonoEdgeError(
                f"the hints with their picture are {total} tokens long and the context holds {session.spec.context}: "
                "build the bundle with a larger context"
            )
        if self._visible.shape[1] != total:
            before = np.ones((len(layout.ids), length), np.bool_)
            self._visible = np.concatenate([before, layout.visible], axis=1)
        session.rewind(0)
        session.extend(prefix.ids, prefix.positions, image_embeds=prefix.embeds)
        logits = session.extend(  # [r, vocab]
            layout.ids,
            np.ascontiguousarray(np.broadcast_to(layout.offsets + prefix.next_position, (3, len(layout.ids)))),
            visible=self._visible,
            logits_rows=layout.rows,
        )
        session.rewind(length)
        peak = logits.max(axis=1)  # [r]
        normaliser = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))  # [r]
        tokens = logits[layout.picked_row, layout.picked_token] - normaliser[layout.picked_row]  # [p]
        candidates = np.bincount(layout.picked_candidate, weights=tokens).astype(np.float32)  # [c]
        return {hint.name: candidates[part] for hint, part in zip(self.schema.hints, layout.slices, strict=True)}


def poor_frame(schema: HintSchema, why: str) -> list[HintResult]:
    """Return what is said of a frame that is not worth asking about: every unconditional hint abstains, saying why."""
    reason = f"{POOR_FRAME}: {why}"
    return [
        HintResult(hint.name, None, None, 0.0, abstain=True, reason=reason, candidates={}, valid_ms=hint.valid_ms)
        for hint in schema.hints
        if hint.ask_when is None
    ]


def _result(
    hint: HintSpec,
    scores: npt.NDArray[np.float32],
    calibration: HintCalibration,
    quality: str | None,
    *,
    unseen: bool,
) -> HintResult:
    shares = probabilities(scores, calibration)  # [candidates]
    best = int(np.argmax(shares))
    probability = float(shares[best])
    reason = UNSEEN if unseen else LOW_CONFIDENCE if probability < calibration.abstain_below else None
    ids = hint.candidate_ids()
    # No coverage is promised for a picture unlike those that the sets were measured on.
    calibrated = calibration.coverage is not None and not unseen
    inside = may_be_right(shares, calibration, quality) & calibrated
    return HintResult(
        hint=hint.name,
        answer=None if reason else ids[best],
        text=None if reason else hint.candidates[best].text,
        probability=probability,
        abstain=reason is not None,
        reason=reason,
        candidates=dict(zip(ids, map(float, shares), strict=True)),
        set=tuple(ids[index] for index in np.argsort(-shares, kind="stable") if inside[index]),
        coverage=calibration.coverage if calibrated else None,
        valid_ms=hint.valid_ms,
        abstain_below=calibration.abstain_below,
    )
