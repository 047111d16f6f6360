"""EchoVLM's conversation files: phantoms written and read back, real data read, errors that name the entry."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sonoedge.calibration.conversations import (
    IMAGE_MARK,
    each_entry,
    read_conversations,
    write_phantom_conversations,
)
from sonoedge.calibration.phantom import phantom
from sonoedge.calibration.phantom_text import report_fields, truth_fields
from sonoedge.errors import SonoEdgeError

BUSI = Path(__file__).resolve().parents[2].parent / "shared/data/busi/conversations.json"


@pytest.fixture
def valid(tmp_path: Path) -> list[dict[str, Any]]:
    """Two good entries whose images exist, one with keys of its own."""
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((8, 8), np.uint8))
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "This."}]
    return [
        {"id": "one", "image": ["a.png"], "description": "x", "conversations": turns},
        {"id": 2, "image": ["b.png"], "conversations": [{"from": "system", "value": "Be kind."}, *turns]},
    ]


def write(folder: Path, entries: object) -> Path:
    """Write entries as JSON beside their images."""
    path = folder / "cases.json"
    path.write_text(json.dumps(entries))
    return path


def test_phantoms_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = write_phantom_conversations(tmp_path / "data", range(6), ("en", "zh"))
    cases = read_conversations(path)
    assert len(cases) == 12
    assert len({case.id for case in cases}) == 12
    for case in cases:
        assert case.phantom is not None
        made = phantom(case.phantom.seed)
        assert case.phantom == made.truth
        stored = cv2.imread(case.image[0], cv2.IMREAD_GRAYSCALE)
        assert stored is not None
        assert np.array_equal(stored, made.image[:, :, 0])
        assert case.exchanges[0][0].startswith(IMAGE_MARK)
        language = "en" if str(case.id).endswith("en") else "zh"
        assert report_fields(case.exchanges[-1][1], language) == truth_fields(made.truth)
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_the_written_file_is_in_echovlm_s_form(tmp_path: Path) -> None:
    entries = json.loads(write_phantom_conversations(tmp_path / "data", [3], ["zh"]).read_text())
    assert set(entries[0]) == {"id", "image", "conversations", "phantom"}
    assert entries[0]["image"] == ["images/phantom_00000003.png"]
    assert [turn["from"] for turn in entries[0]["conversations"][:3]] == ["system", "human", "gpt"]
    assert set(entries[0]["conversations"][0]) == {"from", "value"}


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="already exists"):
        write_phantom_conversations(tmp_path, [0], ["en"])


@pytest.mark.parametrize(("seeds", "languages", "words"), [([0, -1], ["en"], "seed -1"), ([0], ["fr"], "'fr'")])
def test_nothing_is_left_of_a_failed_write(tmp_path: Path, seeds: list[int], languages: list[str], words: str) -> None:
    with pytest.raises(SonoEdgeError, match=words):
        write_phantom_conversations(tmp_path / "data", seeds, languages)
    assert list(tmp_path.iterdir()) == []


def test_extra_keys_and_numeric_ids_are_tolerated(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    first, second = read_conversations(write(tmp_path, valid))
    assert first.image == (str(tmp_path / "a.png"),)
    assert first.exchanges == (("<image>What?", "This."),)
    assert first.system is None
    assert (second.id, second.system) == (2, "Be kind.")


def test_an_error_names_the_entry_and_the_key(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    del valid[1]["image"]
    with pytest.raises(SonoEdgeError, match=r"image.*\$\[1\]"):
        read_conversations(write(tmp_path, valid))


def test_an_unknown_speaker_is_named(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    valid[0]["conversations"][1]["from"] = "doctor"
    with pytest.raises(SonoEdgeError, match=r"doctor.*\$\[0\]\.conversations\[1\]\.from"):
        read_conversations(write(tmp_path, valid))


def test_turns_out_of_order_are_named(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    valid[1]["conversations"] = valid[1]["conversations"][::-1]
    with pytest.raises(SonoEdgeError, match=r"entry 1 \(id 2\).*gpt, human, system"):
        read_conversations(write(tmp_path, valid))


def test_image_marks_must_match_the_images(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    valid[0]["image"] = ["a.png", "b.png"]
    with pytest.raises(SonoEdgeError, match="2 images but the turns hold 1"):
        read_conversations(write(tmp_path, valid))


def test_missing_images_are_listed(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.png").unlink()
    with pytest.raises(SonoEdgeError, match=r"a\.png, .*b\.png"):
        read_conversations(write(tmp_path, valid))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": 1}', "[1]"])
def test_a_file_that_is_no_such_list_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cases.json"
    path.write_text(text)
    with pytest.raises(SonoEdgeError, match=r"cases\.json"):
        read_conversations(path)


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="nowhere"):
        read_conversations(tmp_path / "nowhere.json")


@pytest.mark.skipif(not BUSI.is_file(), reason="waits for the BUSI conversations in ../shared/data/busi")
def test_real_echovlm_data_is_read() -> None:
    cases = read_conversations(BUSI)
    assert len(cases) == 624
    for case in cases:
        assert case.system
        assert len(case.image) == 1
        ((question, answer),) = case.exchanges
        assert question.startswith(IMAGE_MARK)
        assert answer
        assert case.phantom is None


def test_a_case_says_its_region_or_its_phantom_does(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    valid[0]["region"] = "breast"
    assert [case.shown for case in read_conversations(write(tmp_path, valid))] == ["breast", None]
    (shown,) = read_conversations(write_phantom_conversations(tmp_path / "data", [3], ["en"]))
    assert shown.region is None
    assert shown.shown == phantom(3).truth.region
    valid[1]["region"] = 5
    with pytest.raises(SonoEdgeError, match=r"Expected `str . null`, got `int` - at `\$\[1\]\.region`"):
        read_conversations(write(tmp_path, valid))


def test_a_single_image_need_not_stand_in_a_list_and_unmarked_images_stand_before_the_first_question(
    tmp_path: Path, valid: list[dict[str, Any]]
) -> None:
    valid[0]["image"] = "a.png"
    valid[1]["image"] = ["a.png", "b.png"]
    valid[1]["conversations"][1] = {"from": "human", "value": "What?"}
    first, second = read_conversations(write(tmp_path, valid))
    assert first.image == (str(tmp_path / "a.png"),)
    assert second.exchanges == ((IMAGE_MARK * 2 + "What?", "This."),)


def test_several_turns_and_images_across_turns(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    valid[0]["image"] = ["a.png", "b.png"]
    later = [{"from": "human", "value": "And this?<image>"}, {"from": "gpt", "value": "That."}]
    valid[0]["conversations"] = [*valid[0]["conversations"], *later]
    assert len(read_conversations(write(tmp_path, valid))[0].exchanges) == 2


def test_each_entry_is_given_or_what_is_wrong_with_it(tmp_path: Path, valid: list[dict[str, Any]]) -> None:
    bad = [{"id": 3}, {"id": 4, "image": [], "conversations": [{"from": "gpt", "value": "x"}]}, 7]
    found = list(each_entry(write(tmp_path, [*valid, *bad])))
    assert [isinstance(entry, str) for entry in found] == [False, False, True, True, True]
    assert "missing required field `image`" in str(found[2])
    assert "id 4: key 'from' goes gpt" in str(found[3])
    with pytest.raises(SonoEdgeError, match="hold no entry"):
        list(each_entry(write(tmp_path, [])))


@pytest.mark.parametrize("junk", [b"\x00\xff\xfe\x80", b"[" * 100_000, b'[{"id": "\xff"}]', b'{"a": 1}'])
def test_binary_junk_is_refused_in_one_sentence(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "cases.json"
    path.write_bytes(junk)
    with pytest.raises(SonoEdgeError, match="malformed"):
        read_conversations(path)
