"""The orientation marker: found where it is drawn in colour, believed when it stays, else the setting or the feed."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.runtime.frame import Frame
from sonoedge.runtime.orientation import AGREEING, Orientation, find_marker
from sonoedge.runtime.sources import open_source

RECORDINGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pocus"
Picture = npt.NDArray[np.uint8]


def picture(*marks: tuple[int, int, int], colour: tuple[int, int, int] = (60, 140, 250)) -> Picture:
    """A grey sector in a black picture of 480 x 640, with filled circles (x, y, radius)."""
    image = np.zeros((480, 640, 3), np.uint8)
    image[80:460, 120:520] = np.random.default_rng(3).integers(30, 220, (380, 400, 1), dtype=np.uint8)
    for x, y, radius in marks:
        cv2.circle(image, (x, y), radius, colour, -1)
    return image


def frame(image: Picture, number: int = 0, *, flipped: bool | None = None) -> Frame:
    return Frame(image, number, 0, None, "test", None, flipped)


def mirrored(image: Picture) -> Picture:
    return np.ascontiguousarray(image[:, ::-1])


def test_a_coloured_mark_is_found_on_its_side() -> None:
    assert find_marker(picture((110, 60, 9))) == "left"
    assert find_marker(mirrored(picture((110, 60, 9)))) == "right"


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        picture((110, 60, 9), colour=(250, 250, 250)),  # grey marks are not told from writing
        picture((110, 60, 9), (540, 60, 9)),  # two coloured things
        picture((200, 250, 60)),  # a flow image
        picture((200, 110, 60)),
        picture((110, 400, 9)),  # low
        picture((320, 60, 9)),  # in the middle
        picture((110, 60, 1)),  # a speck
        np.zeros((480, 640, 3), np.uint8),
    ],
)
def test_what_is_no_marker_says_nothing(image: Picture) -> None:
    assert find_marker(image) is None


def test_a_flipped_picture_is_turned_once_several_looks_agree() -> None:
    image = mirrored(picture((110, 60, 9)))
    orientation = Orientation()
    turned = [orientation.is_flipped(frame(image, number)) for number in range(AGREEING + 2)]
    assert turned == [False] * (AGREEING - 1) + [True] * 3
    assert np.array_equal(orientation.upright(image, frame(image)), image[:, ::-1])


def test_a_glimpse_changes_nothing_and_a_hidden_marker_stands() -> None:
    left, right, none = picture((110, 60, 9)), mirrored(picture((110, 60, 9))), picture()
    orientation = Orientation()
    for number in range(30):
        orientation.is_flipped(frame(right if number == 7 else left, number))
    assert orientation.marker == "left"
    orientation = Orientation()
    for _ in range(AGREEING):
        orientation.is_flipped(frame(right))
    assert all(orientation.is_flipped(frame(none)) for _ in range(40))
    for _ in range(200):
        flipped = orientation.is_flipped(frame(left))
    assert not flipped


def test_settings_and_the_feeds_word_come_before_the_marker() -> None:
    right = mirrored(picture((110, 60, 9)))
    assert not any(Orientation("no").is_flipped(frame(right, flipped=True)) for _ in range(9))
    assert Orientation("yes").is_flipped(frame(picture()))
    assert Orientation().is_flipped(frame(picture(), flipped=True))
    orientation = Orientation()
    assert not any(orientation.is_flipped(frame(right, flipped=False)) for _ in range(9))


def test_the_sonosite_clip_has_no_marker_that_is_told_from_anatomy(clip: Path) -> None:
    source = open_source(str(clip))
    frames = iter(source)
    assert [find_marker(next(frames).image) for _ in range(30)] == [None] * 30
    source.close()


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="waits for ../shared/data/pocus beside the repository")
def test_the_recordings_of_handheld_devices() -> None:
    paths = sorted(path for path in RECORDINGS.glob("*") if path.suffix in (".mp4", ".png"))
    assert paths
    for path in paths:
        video = cv2.VideoCapture(str(path))
        looked = 0
        while video.grab():
            if looked % 25 == 0:
                image = np.ascontiguousarray(np.asarray(video.retrieve()[1], np.uint8)[..., ::-1])
                assert (path.name, find_marker(image)) == (path.name, "left")
                assert find_marker(mirrored(image)) == "right"
            looked += 1
        video.release()
        assert looked
