"""The verb on files: every task measured by the session that serves, systems side by side, faults in one sentence."""

import json
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from sonoedge.calibration.conversations import write_phantom_conversations
from sonoedge.calibration.phantom import phantom
from sonoedge.export.evaluation.answers import answer_all
from sonoedge.export.evaluation.cases import FileCases, contrast, sharpness
from sonoedge.export.evaluation.result import Evaluation
from sonoedge.runtime.hints import load_schema
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.sessions.fake import FakeSession
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four cases: two pictures and turns, a single choice, a true or false, and a report that is answered emptily."""
    for seed in range(4):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), phantom(seed, size=128).image)
    marks = [["0.png", "1.png"], ["1.png"], ["2.png"], ["3.png"]]
    turns = [
        [("Where?", "liver"), ("Sure?", "Yes")],
        [("What? A. cyst B. mass", "B")],
        [("描述正确吗？只回True或False", "False")],
        [("Report.", ""), ("Again.", "The liver is normal. No lesion is seen.")],
    ]
    entries = []
    for number, (images, asked) in enumerate(zip(marks, turns, strict=True)):
        said = []
        for index, (question, answer) in enumerate(asked):
            mark = "" if index else "<image>" * len(images)
            said += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        entries.append({"id": number, "image": images, "conversations": said})
    (tmp_path / "cases.json").write_text(json.dumps(entries))
    return tmp_path / "cases.json"


def test_every_question_is_answered_once_and_choices_by_probabilities(data: Path, tiny_tokenizer: Tokenizer) -> None:
    session = FakeSession(tiny_tokenizer, load_schema(), image=ImageSpec(max_pixels=84 * 84))
    answered = answer_all(session, tiny_tokenizer, FileCases(data), "ask")
    assert [len(said) for said in answered.said] == [2, 1, 1, 1]
    where, sure = answered.said[0]
    assert "Where?" in where.text
    assert where.chosen is None
    assert sure.text in ("Yes", "No")
    (choice,) = answered.said[1]
    assert choice.text == "A"  # the fake reads the letter from the brightness: dark
    assert choice.probabilities[0] > 0.9
    assert sum(choice.probabilities) == pytest.approx(1)
    assert answered.cases[3].questions[0].text == "Again."


def test_turns_that_do_not_fit_are_left_out_and_counted(tmp_path: Path, tiny_tokenizer: Tokenizer) -> None:
    path = write_phantom_conversations(tmp_path / "data", [1], ["en"], size=128)
    spec = ImageSpec(max_pixels=84 * 84)
    counts = {}
    for context in (4096, 200):
        session = FakeSession(tiny_tokenizer, load_schema(), image=spec, context=context)
        (said,) = answer_all(session, tiny_tokenizer, FileCases(path), "ask").said
        counts[context] = [answer.turns_left_out for answer in said]
    assert set(counts[4096]) == {0}
    assert counts[200][0] == 0
    assert counts[200][-1] > 0


def test_systems_side_by_side(tiny: Any, sonoedge: Any, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ran = sonoedge("evaluate", tiny.checkpoint, "--against", tiny.bundle, "--data", data, "--out", out, "--json")
    assert ran.status == 0, ran.err
    report = msgspec.json.decode(ran.last_line)
    assert "accuracy" not in report
    assert report["frames"] == 4
    assert [system["name"] for system in report["systems"]] == ["checkpoint", "bundle"]
    assert {score["task"] for score in report["scores"]} == {"report", "diagnosis", "vqa"}
    assert all(len(score["systems"]) == 2 and len(score["differences"]) == 1 for score in report["scores"])
    assert "empty answer: 1" in " ".join(report["notes"])
    assert "zh" in report["tokenization"]
    whole = msgspec.json.decode((out / "evaluation.json").read_bytes())
    assert msgspec.convert(whole["evaluation"], Evaluation).frames == 4
    assert len(whole["answers"]) == report["questions"] == 5
    assert (out / "evaluation.html").read_text().startswith("<!doctype html>")


def test_a_system_against_itself_differs_in_nothing(tiny: Any, sonoedge: Any, data: Path) -> None:
    ran = sonoedge("evaluate", tiny.checkpoint, "--against", tiny.checkpoint, "--data", data, "--json")
    assert ran.status == 0, ran.err
    report = msgspec.json.decode(ran.last_line)
    assert [system["name"] for system in report["systems"]] == ["checkpoint (1)", "checkpoint (2)"]
    assert {score["differences"][0]["interval"]["value"] for score in report["scores"]} == {0}
    assert {score["differences"][0]["p_value"] for score in report["scores"] if score["group"] == "all"} == {1}


def test_tables_of_files_and_a_limit(tiny: Any, sonoedge: Any, data: Path) -> None:
    ran = sonoedge("evaluate", tiny.checkpoint, "--data", data, "--frames", 2)
    assert ran.status == 0, ran.err
    assert "Diagnosis: single choice: 1 questions" in " ".join(ran.out.split())
    assert "2 cases beyond the limit were not asked" in " ".join(ran.out.split())


def test_a_labelled_folder(tiny: Any, sonoedge: Any, tmp_path: Path) -> None:
    for seed in range(4):
        folder = tmp_path / "breast" / ("benign", "malignant")[seed % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{seed}.png"), phantom(seed, size=128).image)
    ran = sonoedge("evaluate", tiny.checkpoint, "--data", tmp_path / "breast", "--json")
    assert ran.status == 0, ran.err
    report = msgspec.json.decode(ran.last_line)
    assert report["classes"] == ["benign", "malignant"]
    assert sum(sum(row) for row in report["confusion"][0]["counts"]) == 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "do not exist"),
        ("junk", "unreadable picture: 1"),
        ("long", "more than 200 times longer than wide"),
        ("answers", "no case has both a picture and an answer"),
    ],
)
def test_hostile_data_is_refused_in_one_sentence(tiny: Any, sonoedge: Any, data: Path, damage: str, words: str) -> None:
    if damage == "missing":
        (data.parent / "2.png").unlink()
    elif damage == "junk":
        (data.parent / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    elif damage == "long":
        cv2.imwrite(str(data.parent / "2.png"), np.zeros((3, 900), np.uint8))
    else:
        entries = json.loads(data.read_text())
        for entry in entries:
            for turn in entry["conversations"]:
                turn["value"] = turn["value"] if turn["from"] == "human" else " "
        data.write_text(json.dumps(entries))
    ran = sonoedge("evaluate", tiny.checkpoint, "--data", data)
    assert ran.status == 2
    assert words in ran.err
    assert ran.err.strip().splitlines()[-1].startswith("sonoedge: error: ")


def test_phantoms_keep_their_keys_and_gain_reports(tiny: Any, sonoedge: Any) -> None:
    ran = sonoedge("evaluate", tiny.checkpoint, "--frames", 4, "--json")
    assert ran.status == 0, ran.err
    report = msgspec.json.decode(ran.last_line)
    assert set(report["strata"]) == {"good frames", "poor frames", "small lesions", "large lesions"}
    hints = [s for s in report["scores"] if s["group"] == "kind" and s["value"].startswith("hint: ")]
    for score in hints:
        name = score["value"].removeprefix("hint: ")
        assert score["systems"][0]["value"] == pytest.approx(100 * report["accuracy"][name])
    assert {s["language"] for s in report["scores"] if s["task"] == "report"} == {"en", "zh"}


def test_contrast_and_sharpness_order_pictures_as_eyes_do() -> None:
    clear = phantom(3, quality="good").image
    blurred = cv2.GaussianBlur(clear, (0, 0), 3)
    flat = (clear // 4 + 64).astype(np.uint8)
    assert sharpness(clear) > 2 * sharpness(np.asarray(blurred, np.uint8))
    assert contrast(clear) > 2 * contrast(flat)
    assert contrast(np.full((40, 40, 3), 9, np.uint8)) == 0
