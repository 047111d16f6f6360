"""Hints over time: no flicker, a clear change comes through, forgetting at gaps and at another region, silence."""

import math

import msgspec
import numpy as np
import pytest

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.hint_engine import LOW_CONFIDENCE, POOR_FRAME, STALE_FRAME, UNSEEN, HintResult, poor_frame
from sonoedge.runtime.hint_smoothing import MARGIN, HintSmoother
from sonoedge.runtime.hints import HintSchema

MS = 1_000_000
STEP_MS = 33


def at(ms: float, source: str = "probe") -> Frame:
    return Frame(np.zeros((4, 4, 3), np.uint8), int(ms), int(ms * MS), None, source)


def hint(schema: HintSchema, name: str, answer: str, share: float = 0.9, *, least: float = 0.0) -> HintResult:
    """A result of one frame as the engine makes it; the other candidates share what is left."""
    spec = schema.hint(name)
    rest = (1 - share) / (len(spec.candidates) - 1)
    shares = {candidate: share if candidate == answer else rest for candidate in spec.candidate_ids()}
    silent = share < least
    text = next(candidate.text for candidate in spec.candidates if candidate.id == answer)
    return HintResult(
        name,
        None if silent else answer,
        None if silent else text,
        share,
        abstain=silent,
        reason=LOW_CONFIDENCE if silent else None,
        candidates=shares,
        valid_ms=spec.valid_ms,
        abstain_below=least,
    )


def unseen(result: HintResult) -> HintResult:
    return msgspec.structs.replace(result, answer=None, text=None, abstain=True, reason=UNSEEN)


def said(results: list[HintResult]) -> dict[str, str | None]:
    return {result.hint: result.answer for result in results}


def test_a_wavering_answer_does_not_flicker(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    shown = []
    for number in range(60):  # every third frame says otherwise, more surely
        poor = number % 3 == 2
        given = hint(schema, "quality", "poor" if poor else "good", 0.75 if poor else 0.7)
        shown += [result.answer for result in smoother.update(at(number * STEP_MS), [given])]
    assert shown == ["good"] * 60


def test_a_lead_smaller_than_the_margin_changes_nothing(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    smoother.update(at(0), [hint(schema, "quality", "good", 0.6)])
    for number in range(1, 200):
        (result,) = smoother.update(at(number * STEP_MS), [hint(schema, "quality", "poor", 0.5 + MARGIN / 2 - 0.01)])
    assert result.answer == "good"
    assert result.probability == pytest.approx(result.candidates["good"])
    assert result.probability < 0.5
    for number in range(200, 240):
        (result,) = smoother.update(at(number * STEP_MS), [hint(schema, "quality", "poor", 0.5 + MARGIN)])
    assert result.answer == "poor"


def test_a_true_change_comes_within_the_time_constant(schema: HintSchema) -> None:
    smoother = HintSmoother(schema, time_constant_ms=300)
    for number in range(30):
        smoother.update(at(number * STEP_MS), [hint(schema, "finding", "absent", 0.9)])
    changed = next(
        number
        for number in range(30)
        if smoother.update(at((30 + number) * STEP_MS), [hint(schema, "finding", "present", 0.9)])[0].answer
        == "present"
    )
    assert changed >= 2
    assert changed * STEP_MS <= 300


def test_the_average_is_that_of_logarithms_with_the_stated_time_constant(schema: HintSchema) -> None:
    smoother = HintSmoother(schema, time_constant_ms=200)
    smoother.update(at(0), [hint(schema, "quality", "good", 0.9)])
    (result,) = smoother.update(at(100), [hint(schema, "quality", "good", 0.6)])
    kept = math.exp(-0.5)
    odds = kept * math.log(0.9 / 0.1) + (1 - kept) * math.log(0.6 / 0.4)
    assert result.probability == pytest.approx(1 / (1 + math.exp(-odds)))


def test_another_region_forgets_the_last_exam(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    for number in range(30):
        smoother.update(
            at(number * STEP_MS), [hint(schema, "region", "liver"), hint(schema, "finding", "present", 0.99)]
        )
    for number in range(30, 60):
        results = smoother.update(
            at(number * STEP_MS), [hint(schema, "region", "thyroid"), hint(schema, "finding", "absent", 0.8)]
        )
        if said(results)["region"] == "thyroid":
            break
        assert said(results) == {"region": "liver", "finding": said(results)["finding"]}
    finding = results[1]
    assert finding.answer == "absent"
    assert finding.probability == pytest.approx(0.8)  # of this frame alone


def test_missing_frames_and_another_feed_begin_anew(schema: HintSchema) -> None:
    for later in (at(5000), at(STEP_MS, source="other")):
        smoother = HintSmoother(schema)
        smoother.update(at(0), [hint(schema, "quality", "good", 0.99)])
        (result,) = smoother.update(later, [hint(schema, "quality", "poor", 0.6)])
        assert (result.answer, round(result.probability, 6)) == ("poor", 0.6)


def test_a_clock_set_back_begins_anew(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    smoother.update(at(9000), [hint(schema, "quality", "good", 0.99)])
    assert said(smoother.update(at(100), [hint(schema, "quality", "poor", 0.6)])) == {"quality": "poor"}


def test_dependent_hints_follow_the_smoothed_answer(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    present = [hint(schema, "finding", "present", 0.95), hint(schema, "kind", "cyst"), hint(schema, "side", "left")]
    for number in range(20):
        smoother.update(at(number * STEP_MS), present)
    flicker = smoother.update(at(20 * STEP_MS), [hint(schema, "finding", "absent", 0.6)])
    assert said(flicker) == {"finding": "present", "kind": "cyst", "side": "left"}
    for number in range(21, 60):
        results = smoother.update(at(number * STEP_MS), [hint(schema, "finding", "absent", 0.95)])
    assert said(results) == {"finding": "absent"}


def test_low_smoothed_confidence_is_silent_and_says_why(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    for number in range(40):
        answer = "good" if number % 2 else "poor"
        (result,) = smoother.update(at(number * STEP_MS), [hint(schema, "quality", answer, 0.9, least=0.8)])
    assert (result.abstain, result.answer, result.text, result.reason) == (True, None, None, LOW_CONFIDENCE)
    assert result.probability < 0.8


def test_unseen_pictures_silence_unless_they_are_few(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    known = [hint(schema, "region", "liver"), hint(schema, "quality", "good")]
    strange = [unseen(result) for result in known]
    for number in range(20):
        smoother.update(at(number * STEP_MS), known)
    assert said(smoother.update(at(20 * STEP_MS), strange)) == {"region": "liver", "quality": "good"}
    for number in range(21, 40):
        results = smoother.update(at(number * STEP_MS), strange)
    assert {result.reason for result in results} == {UNSEEN}
    blip = smoother.update(at(40 * STEP_MS), known)  # one that looks familiar among them says nothing either
    assert {(result.answer, result.reason, result.set) for result in blip} == {(None, UNSEEN, ())}
    for number in range(41, 70):
        results = smoother.update(at(number * STEP_MS), known)
    assert said(results) == {"region": "liver", "quality": "good"}


def test_the_first_unseen_picture_gets_no_answer(schema: HintSchema) -> None:
    (result,) = HintSmoother(schema).update(at(0), [unseen(hint(schema, "region", "liver"))])
    assert (result.answer, result.reason) == (None, UNSEEN)


def test_a_poor_frame_is_silent_at_once_and_does_not_count(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    known = [hint(schema, "region", "liver"), hint(schema, "quality", "good"), hint(schema, "finding", "absent")]
    smoother.update(at(0), known)
    poor = smoother.update(at(STEP_MS), poor_frame(schema, "in air"))
    assert [(result.hint, result.answer, result.reason) for result in poor] == [
        (name, None, f"{POOR_FRAME}: in air") for name in ("region", "quality", "finding")
    ]
    after = smoother.update(at(2 * STEP_MS), known)
    assert said(after) == {"region": "liver", "quality": "good", "finding": "absent"}


def test_an_old_frame_abstains_as_stale(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    given = [hint(schema, "region", "liver"), hint(schema, "quality", "good")]
    assert schema.hint("quality").valid_ms < schema.hint("region").valid_ms
    now = (schema.hint("quality").valid_ms + 1) * MS
    region, quality = smoother.update(at(0), given, now)
    assert (region.answer, region.reason) == ("liver", None)
    assert (quality.answer, quality.text, quality.abstain, quality.reason) == (None, None, True, STALE_FRAME)


def test_hints_expire_once_when_no_frame_comes(schema: HintSchema) -> None:
    smoother = HintSmoother(schema)
    smoother.update(at(0), [hint(schema, "region", "liver"), hint(schema, "quality", "good")])
    assert smoother.expire(schema.hint("quality").valid_ms * MS) == []
    assert [(r.hint, r.reason) for r in smoother.expire((schema.hint("quality").valid_ms + 1) * MS)] == [
        ("quality", STALE_FRAME)
    ]
    assert [r.hint for r in smoother.expire(60_000 * MS)] == ["region"]
    assert smoother.expire(60_000 * MS) == []
