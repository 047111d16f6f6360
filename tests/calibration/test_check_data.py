"""Data is checked before hours are spent on it: every kind of fault is found and named, and good data passes."""

import json
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from sonoedge.calibration.check_data import EMPTY, FAULTY, MISSING, UNREADABLE, check_files
from sonoedge.calibration.conversations import write_phantom_conversations
from sonoedge.calibration.phantom import phantom
from sonoedge.errors import SonoEdgeError


def entry(name: str, image: str, answer: str = "A cyst.", **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": [image], "conversations": turns, **more}


def write(path: Path, entries: list[Any]) -> Path:
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three frames, a smaller JPEG of the first, one that is cut off, and one that claims an absurd size."""
    for seed in (1, 2, 3):
        cv2.imwrite(str(tmp_path / f"{seed}.png"), phantom(seed, region="liver").image)
    small = cv2.resize(phantom(1, region="liver").image, (150, 150), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(tmp_path / "again.jpg"), small)
    (tmp_path / "cut.png").write_bytes((tmp_path / "2.png").read_bytes()[:200])
    head = bytearray((tmp_path / "2.png").read_bytes()[:33])
    head[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    (tmp_path / "absurd.png").write_bytes(bytes(head) + (tmp_path / "2.png").read_bytes()[33:])
    return tmp_path


def test_every_fault_is_found_and_named(pictures: Path) -> None:
    marks = entry("marks", "3.png")
    marks["image"] = ["3.png", "2.png"]
    path = write(
        pictures / "cases.json",
        [
            entry("good", "1.png", region="liver"),
            entry("again", "again.jpg"),
            entry("gone", "gone.png"),
            entry("cut", "cut.png"),
            entry("absurd", "absurd.png"),
            entry("empty", "2.png", "  "),
            marks,
            {"id": "no image"},
        ],
    )
    found = check_files([path])
    assert not found.usable
    told = {(problem.kind, problem.where.rpartition("/")[2]) for problem in found.problems}
    assert told == {
        (MISSING, "gone.png"),
        (UNREADABLE, "cut.png"),
        (UNREADABLE, "absurd.png"),
        (EMPTY, "id 'empty'"),
        (FAULTY, "entry 6"),
        (FAULTY, "entry 7"),
    }
    assert [[Path(name).name for name in group] for group in found.duplicates] == [["1.png", "again.jpg"]]
    (split,) = found.splits
    assert (split.cases, split.regions) == (6, {"not said": 5, "liver": 1})
    assert found.summary.startswith("entry that cannot be used: 2; empty answer: 1; missing file: 1")


def test_pictures_that_sets_share_make_them_unusable(pictures: Path) -> None:
    train = write(pictures / "train.json", [entry("a", "1.png"), entry("b", "2.png")])
    test = write(pictures / "test.json", [entry("c", "again.jpg"), entry("d", "3.png")])
    found = check_files([train, test])
    assert [len(group) for group in found.duplicates_across] == [2]
    assert found.duplicates == ()
    assert not found.usable
    assert check_files([train]).usable
    with pytest.raises(SonoEdgeError, match="named twice"):
        check_files([train, train])


def test_one_picture_with_several_cases_is_no_duplicate(pictures: Path) -> None:
    found = check_files([write(pictures / "cases.json", [entry("a", "1.png"), entry("b", "1.png")])])
    assert (found.usable, found.duplicates, found.summary) == (True, (), "nothing is wrong")


def test_balance_of_kinds_regions_and_classes(tmp_path: Path) -> None:
    path = write_phantom_conversations(tmp_path / "data", range(12), ("en", "zh"))
    (split,) = check_files([path]).splits
    assert (split.cases, split.pictures) == (24, 12)
    assert split.questions["single choice"] == 24
    assert split.questions["report"] + split.questions.get("description", 0) == 24
    assert sum(split.regions.values()) == 24
    assert sum(split.classes.values()) == 24


def test_the_verb_says_it_as_a_table_and_as_json(pictures: Path, sonoedge: Any) -> None:
    good = write(pictures / "good.json", [entry("a", "1.png")])
    bad = write(pictures / "bad.json", [entry("b", "again.jpg"), entry("c", "gone.png")])
    ran = sonoedge("check-data", good)
    assert ran.status == 0, ran.err
    assert "nothing is wrong (near: at most" in " ".join(ran.out.split())
    ran = sonoedge("check-data", good, bad)
    assert ran.status == 1
    assert "missing file: 1" in ran.out
    ran = sonoedge("check-data", good, bad, "--json")
    assert ran.status == 1
    told = msgspec.json.decode(ran.last_line)
    assert told["usable"] is False
    assert told["problems"][0]["kind"] == MISSING
    assert len(told["duplicates_across"]) == 1


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere.json", "cannot be read"), ("empty", "neither a conversation file nor a folder")]
)
def test_what_is_no_data_is_refused_in_one_sentence(tmp_path: Path, sonoedge: Any, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    ran = sonoedge("check-data", tmp_path / name)
    assert ran.status == 2
    assert words in ran.err


def test_a_labelled_folder_is_checked_too(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("benign/a.png", "benign/b.png", "malignant/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), cv2.resize(rng.integers(0, 255, (9, 9), np.uint8), (64, 64)))
    found = check_files([tmp_path])
    assert found.usable
    assert found.splits[0].classes == {"benign": 2, "malignant": 1}
