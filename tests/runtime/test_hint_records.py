"""Hints in the audit log: every frame can be looked up, and a steady picture does not fill the log."""

from collections.abc import Mapping
from typing import Any

import hypothesis
import msgspec
from hypothesis import strategies as st

from sonoedge.runtime.hint_records import SPAN_S, HintRecords
from sonoedge.runtime.hints import Text
from sonoedge.runtime.protocol import Hint

FRAME_NS = 33_000_000


def hint(name: str, answer: str | None, frame: int, probability: float = 0.9) -> Hint:
    """A hint about a frame of a feed of 30 a second."""
    return Hint(
        hint=name,
        answer=answer,
        text=None if answer is None else Text(answer, answer),
        probability=probability,
        abstain=answer is None,
        reason="low confidence" if answer is None else None,
        frame=frame,
        age_ms=5.0,
        model="m",
        intended_use="Tests only.",
        captured_ns=frame * FRAME_NS,
        source="clip",
        candidates={"a": probability, "b": 1 - probability},
    )


def recorded(batches: list[list[Hint]]) -> list[tuple[str, dict[str, Any]]]:
    """What is recorded of hints, frame after frame, until the server stops."""
    said: list[tuple[str, dict[str, Any]]] = []
    records = HintRecords(lambda kind, fields: said.append((kind, dict(fields))))
    for batch in batches:
        records.say(batch, dict)
    records.close()
    return said


def test_a_steady_hint_is_recorded_at_its_beginning_and_its_end() -> None:
    said = recorded([[hint("region", "liver", frame, 0.80 + frame / 1000)] for frame in range(100)])
    assert [kind for kind, _ in said] == ["hint", "hint_until"]
    assert said[0][1]["frame"] == 0
    assert said[0][1]["model"] == "m"
    until = said[1][1]
    assert (until["first_frame"], until["last_frame"], until["frames"]) == (0, 99, 100)
    assert (until["least_probability"], until["most_probability"]) == (0.80, 0.899)


def test_the_beginning_is_recorded_at_once() -> None:
    said: list[str] = []
    HintRecords(lambda kind, _: said.append(kind)).say([hint("region", "liver", 0)], dict)
    assert said == ["hint"]


def test_a_long_span_is_ended_and_begun_anew() -> None:
    frames = int(3.5 * SPAN_S * 1e9 / FRAME_NS)
    said = recorded([[hint("region", "liver", frame)] for frame in range(frames)])
    assert [kind for kind, _ in said] == ["hint", "hint_until"] * 4
    assert sum(fields["frames"] for kind, fields in said if kind == "hint_until") == frames


def test_a_frame_that_is_kept_is_named_by_the_record_that_is_about_it() -> None:
    said: list[Mapping[str, Any]] = []
    records = HintRecords(lambda _, fields: said.append(fields))
    kept: list[int] = []
    for frame in range(3):

        def keep(frame: int = frame) -> Mapping[str, str]:
            kept.append(frame)
            return {"kept": f"{frame}.jpg"}

        records.say([hint("region", "liver" if frame < 2 else "kidney", frame)], keep)
    assert kept == [0, 2]
    assert [fields["kept"] for fields in said if "kept" in fields] == ["0.jpg", "2.jpg"]


ANSWERS = st.sampled_from(["liver", "kidney", None])
SAID = st.lists(st.dictionaries(st.sampled_from(["region", "side"]), ANSWERS), min_size=1, max_size=60)


@hypothesis.given(SAID)
def test_every_frame_of_a_hint_lies_in_one_span_with_its_words(
    batches: list[dict[str, str | None]],
) -> None:
    said = recorded([[hint(name, answer, n) for name, answer in batch.items()] for n, batch in enumerate(batches)])
    spans = [fields for kind, fields in said if kind == "hint_until"]
    begun = [(fields["hint"], fields["frame"], fields["answer"]) for kind, fields in said if kind == "hint"]
    assert sorted(map(str, begun)) == sorted(str((s["hint"], s["first_frame"], s["answer"])) for s in spans)
    for number, batch in enumerate(batches):
        for name in ("region", "side"):
            holding = [s for s in spans if s["hint"] == name and s["first_frame"] <= number <= s["last_frame"]]
            assert [s["answer"] for s in holding] == ([batch[name]] if name in batch else [])


def test_a_record_can_be_written() -> None:
    assert all(msgspec.json.encode(fields) for _, fields in recorded([[hint("region", None, 1)]]))
