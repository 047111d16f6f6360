"""What the demo shows: a contact sheet that can be read, and clips played through a server of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sonoedge.calibration.phantom import REGIONS
from sonoedge.errors import SonoEdgeError
from sonoedge.export import demo_play
from sonoedge.export.contact_sheet import COLUMNS, RIGHT, SILENT, TILE, WRONG, HintLine, Tile, write_contact_sheet
from sonoedge.export.demo_play import phantom_feed, play, real_clip, served

LINES = (
    HintLine("region", "liver", 0.97, "liver"),
    HintLine("kind", "cyst", 0.6, "calcification"),
    HintLine("side", None, 0.5, "left", "low confidence"),
)


def tile(height: int, width: int, shade: int) -> Tile:
    return Tile(np.full((height, width, 3), (shade, shade, 255), np.uint8), LINES, "frame 3, truth: good, cyst left")


def test_a_contact_sheet_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    rows = {"a real clip": [tile(240, 320, 40)] * 3, "phantom: liver": [tile(300, 150, 90)] * (COLUMNS + 2)}
    write_contact_sheet(rows, path, "SonoEdge demo")
    sheet = np.asarray(Image.open(path))
    row = TILE + 4 * 17 + 10
    assert sheet.shape == (34 + 2 * (24 + row), COLUMNS * (TILE + 8), 3)
    first = 34 + 24
    assert sheet[first + 100, 4 + 100].tolist() == [40, 40, 255]
    assert sheet[first + TILE - 1, 4 + 100].tolist() == [0, 0, 0], "a wide picture keeps its shape"
    assert sheet[first + 100, 3 * (TILE + 8) + 100].tolist() == [0, 0, 0], "three tiles leave the fourth place empty"
    second = first + row + 24
    for column in range(COLUMNS):
        assert sheet[second + 100, column * (TILE + 8) + 4 + 50].tolist() == [90, 90, 255]
    text = sheet[first + TILE :, :TILE].reshape(-1, 3).tolist()
    for colour in (RIGHT, WRONG, SILENT):
        assert list(colour) in text


def test_a_contact_sheet_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_contact_sheet({"row": [tile(50, 50, 1)]}, tmp_path / "nowhere" / "sheet.png", "title")


def test_lines_say_what_was_said() -> None:
    assert [line.text() for line in LINES] == ["region: liver 97%", "kind: cyst 60%", "side: silent: low confidence"]
    assert HintLine("region", "liver", 0.97, None).colour not in (RIGHT, WRONG, SILENT)


def test_the_real_clip_is_there() -> None:
    clip = real_clip()
    assert len(clip.images) == 30
    assert clip.images[0].shape == (192, 256, 3)  # its ultrasound sector, of 240 x 320
    assert clip.truths == ()


def test_a_phantom_clip_is_played_by_a_server_of_its_own(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_play, "HINTED_FRAMES", 3)
    clip = phantom_feed(REGIONS[2], "cyst", 7, tmp_path / "clip", frames=4)
    assert len(clip.truths) == len(clip.images) == len(list((tmp_path / "clip").iterdir())) == 4
    played = play(tiny.bundle, clip, ("Which region is shown?", "是否可见病灶？"))
    assert len({hint.frame for hint in played.hints}) == 3
    assert {hint.hint for hint in played.hints} >= {"region", "quality", "finding"}
    assert {hint.model for hint in played.hints} == {tiny.report["model"]}
    assert [question for question, _ in played.answers] == ["Which region is shown?", "是否可见病灶？"]


def test_a_server_that_does_not_start_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clip = phantom_feed(REGIONS[0], None, 8, tmp_path / "clip", frames=1)
    refused = pytest.raises(SonoEdgeError, match=r"server for .*clip did not start: .*is not a bundle")
    with refused, served(tmp_path / "nothing", clip.source):
        pass
