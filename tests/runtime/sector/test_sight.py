"""Frames become their sector alone: on screens made with seeds, on recordings, on what is no ultrasound at all."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pydicom.data
import pytest

from sonoedge.calibration.phantom import QUALITIES, phantom, phantom_clip
from sonoedge.calibration.phantom.screen import screen
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.frame_gate import BLACK, IN_AIR
from sonoedge.runtime.sector.outline import Outline
from sonoedge.runtime.sector.tracker import SectorTracker
from sonoedge.runtime.sight import FROZEN, LOOKING, Eye
from sonoedge.runtime.sources import open_source

pytestmark = pytest.mark.sees
DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is not there: recordings to look at")
Image = npt.NDArray[np.uint8]
STEP_NS = 40_000_000


def frame(image: Image, number: int = 0, *, still: bool = False) -> Frame:
    return Frame(np.ascontiguousarray(image), number, number * STEP_NS, None, "test", still=still)


def on_screen(image: Image, at: tuple[int, int] = (150, 100), size: tuple[int, int] = (480, 640)) -> Image:
    """A picture on a black screen with a name above it and another beside it."""
    x, y = at
    made = np.zeros((*size, 3), np.uint8)
    cv2.putText(made, "MUELLER HANS 1970-01-01", (20, 40), 0, 0.8, (255, 255, 255), 2, cv2.LINE_AA)
    cv2.putText(made, "ID 448812", (480, 300), 0, 0.7, (250, 200, 90), 1, cv2.LINE_AA)
    made[y : y + image.shape[0], x : x + image.shape[1]] = image
    return made


def tissue(width: int, height: int, seed: int = 0) -> Image:
    """A rectangle of speckle."""
    values = np.random.default_rng(seed).rayleigh(40, (height // 3, width // 3)).clip(0, 255).astype(np.uint8)
    return np.asarray(cv2.cvtColor(cv2.resize(values, (width, height)), cv2.COLOR_GRAY2RGB), np.uint8)


@pytest.mark.parametrize(
    "outline",
    [
        Outline(120, 60, 0.0, 20, 150, 0.0, 0.0),
        Outline(120, 50, 0.1, 20, 150, 0.0, 0.002),
        Outline(120, 30, 0.7, 40, 150, 0.7 / 30, 1 / (30 / 0.7 + 110)),
    ],
)
def test_an_outline_keeps_its_place_at_any_size(outline: Outline) -> None:
    small, large = outline.mask(180, 240), outline.scaled(3).mask(540, 720)
    shrunk = cv2.resize(large, (240, 180), interpolation=cv2.INTER_AREA)
    assert (np.asarray(shrunk > 127) != (small > 0)).mean() < 0.004
    inner = outline.inset(3).mask(180, 240)
    assert not (inner & ~small).any()
    assert 0 < cv2.countNonZero(inner) < cv2.countNonZero(small)


def test_random_screens_lose_their_writing_and_keep_their_sector() -> None:
    ious, lost, leaks = [], [], []
    for seed in range(900, 908):
        made = screen(seed, 4, quality="good")
        tracker = SectorTracker()
        for image in made.images:
            view = tracker.see(image)
        if view is None:
            continue
        shown = view.allowed > 0
        live = made.sector & (made.images[-1].max(axis=2) > 8)
        ious.append((shown & made.sector).sum() / (shown | made.sector).sum())
        lost.append((live & ~shown).sum() / live.sum())
        leaks.append((shown & made.writing).sum() / made.writing.sum())
    assert len(ious) >= 7
    assert np.median(ious) > 0.97
    assert np.sort(ious)[1] > 0.85
    assert np.median(lost) < 0.03
    assert np.median(leaks) == 0


def test_nothing_beside_the_sector_is_in_what_is_seen() -> None:
    eye = Eye("no")
    for number in range(12):
        sight = eye.see(frame(on_screen(tissue(300, 300, number)), number))
        shown = sight.frame.image
        assert sight.poor is None
        assert abs(shown.shape[0] - 300) <= 6
        assert abs(shown.shape[1] - 300) <= 6
        assert shown.base is None


@pytest.mark.parametrize("quality", QUALITIES)
def test_bare_phantoms_pass_as_they_are(quality: str) -> None:
    same = 0
    for seed in range(12):
        image = phantom(3000 + seed, quality=quality).image
        sight = Eye().see(frame(image, still=True))
        same += sight.poor is None and np.array_equal(sight.frame.image, image)
    assert same >= 11


def test_a_bare_clip_passes_from_its_first_frame_on() -> None:
    eye = Eye()
    for number, made in enumerate(phantom_clip(5, 30, quality="good")):
        sight = eye.see(frame(made.image, number))
        assert sight.poor is None
        assert np.array_equal(sight.frame.image, made.image)


def test_writing_that_comes_to_a_bare_picture_is_never_shown() -> None:
    eye = Eye("no")
    made = [on_screen(tissue(300, 300, number), size=(480, 640)) for number in range(20)]
    for image in made[:10]:
        image[:90] = image[:, 460:] = 0
    for number, image in enumerate(made):
        shown = eye.see(frame(image, number)).frame.image
        assert number < 10 or shown.shape[0] <= 310


def test_a_moved_sector_is_found_again() -> None:
    tracker = SectorTracker()
    for number in range(20):
        tracker.see(on_screen(tissue(250, 300, number), (40, 100)))
    before = tracker.view
    assert before is not None
    assert tracker.locked
    for number in range(14):
        view = tracker.see(on_screen(tissue(200, 240, number), (270, 200), (480, 640)))
    assert view is not None
    assert abs(view.box[0] - 270) <= 5
    assert abs(view.box[1] - 200) <= 5


def test_another_size_begins_anew() -> None:
    tracker = SectorTracker()
    tracker.see(on_screen(tissue(250, 300), (40, 100)))
    view = tracker.see(on_screen(tissue(500, 400), (100, 120), (720, 960)))
    assert view is not None
    assert view.allowed.shape == (720, 960)
    assert abs(view.box[2] - 600) <= 6


@pytest.mark.parametrize(
    "image",
    [
        np.full((480, 640, 3), 255, np.uint8),
        np.full((1, 1, 3), 200, np.uint8),
        np.full((16, 16, 3), 90, np.uint8),
        np.full((7, 900, 3), 90, np.uint8),
        np.repeat(np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 200, axis=0), 3, axis=2),
    ],
    ids=["white", "one pixel", "tiny", "strip", "gradient"],
)
def test_what_is_no_ultrasound_is_hidden(image: Image) -> None:
    sight = Eye().see(frame(image))
    assert sight.poor == LOOKING
    assert sight.empty
    assert sight.frame.image.shape == image.shape
    assert not sight.frame.image.any()


def test_a_page_of_text_is_hidden() -> None:
    page = np.zeros((600, 800, 3), np.uint8)
    for row in range(1, 20):
        cv2.putText(page, "PATIENT NAME 1970-01-01 ID 234", (10, 30 * row), 0, 0.8, (255, 255, 255), 2)
    assert Eye().see(frame(page)).poor == LOOKING


def test_noise_everywhere_is_its_own_sector() -> None:
    image = np.random.default_rng(0).integers(0, 160, (240, 320, 1), np.uint8).repeat(3, axis=2)
    sight = Eye().see(frame(image))
    assert sight.poor is None
    assert np.array_equal(sight.frame.image, image)


def test_pictures_know_that_they_are_still(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), phantom(4).image)
    assert next(iter(open_source(str(tmp_path), once=True, fps=500))).still
    clip = str(pydicom.data.get_testdata_file("examples_ybr_color.dcm", download=False))
    assert not next(iter(open_source(clip, once=True, fps=500))).still


def test_a_box_around_a_sector_says_nothing_of_contact() -> None:
    """A region of DICOM is a box; the corners of a cardiac sector in it are no lost beams."""
    clip = str(pydicom.data.get_testdata_file("examples_ybr_color.dcm", download=False))
    eye = Eye()
    sights = [eye.see(one) for one in open_source(clip, once=True, fps=500)]
    assert all(sight.poor is None for sight in sights)
    (one,) = [one for one in open_source(clip, once=True, fps=500) if one.sequence == 0]
    dark = msgspec.structs.replace(one, image=np.zeros_like(one.image))
    assert Eye().see(dark).poor == BLACK


def test_the_cardiac_clip_is_found_without_its_regions() -> None:
    clip = str(pydicom.data.get_testdata_file("examples_ybr_color.dcm", download=False))
    tracker = SectorTracker()
    for number, one in enumerate(open_source(clip, once=True, fps=500)):
        view = tracker.see(one.image)
        assert view is not None or number < 3  # its dim flanks are seen by their change alone
        truth = one.sector
    assert view is not None
    assert truth is not None
    assert np.abs(np.array(view.box) - np.array(truth)).max() <= 24
    assert not view.allowed[:, :28].any()  # the settings at the left
    assert not view.allowed[215:].any()  # the menu


def recording(name: str, every: int) -> Iterator[Image]:
    video = cv2.VideoCapture(str(DATA / "pocus" / name))
    for number in range(1000):
        read, picture = video.read()
        if not read:
            break
        if number % every == 0:
            yield np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)
    video.release()


@needs_data
@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("butterfly-ocular-phantom.mp4", (77, 202, 691, 890)),
        ("sonosite-anon-eye1-video.mp4", (387, 44, 722, 638)),
        ("clarius-ocular-image.png", (264, 89, 1018, 872)),
        ("interson-phantom.png", (444, 54, 1001, 892)),
    ],
)
def test_recordings_are_seen(name: str, box: tuple[int, int, int, int]) -> None:
    eye = Eye("no")
    sights = [
        eye.see(msgspec.structs.replace(frame(image, number), still=name.endswith("png")))
        for number, image in enumerate(recording(name, 6))
    ]
    assert all(sight.poor in (None, FROZEN, IN_AIR) for sight in sights)
    shapes = np.array([sight.frame.image.shape[:2] for sight in sights])
    assert np.abs(shapes - np.array((box[3] - box[1], box[2] - box[0]))).max() <= 24
