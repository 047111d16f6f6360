"""Bad frames are called what they are, fine ones and still pictures are not, and verdicts do not flicker."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.calibration.phantom import phantom, phantom_clip
from sonoedge.calibration.phantom.bad import Bad, black, in_air, poor_contact
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.frame_gate import BLACK, IN_AIR, POOR_CONTACT
from sonoedge.runtime.sight import FROZEN, Eye

pytestmark = pytest.mark.sees
Image = npt.NDArray[np.uint8]
STEP_NS = 40_000_000


def frame(image: Image, number: int = 0, *, still: bool = False) -> Frame:
    return Frame(np.ascontiguousarray(image), number, number * STEP_NS, None, "test", still=still)


def test_bad_frames_on_a_known_sector_are_called_so_and_do_not_flicker() -> None:
    eye, said = Eye(), []
    clip = [made.image for made in phantom_clip(1, 6, quality="good")]
    dark = [np.zeros_like(clip[0])] * 6
    for number, image in enumerate([*clip, clip[0] // 2, dark[0], *clip, *dark, *clip]):
        said.append(eye.see(frame(image, number)).poor)
    assert said[:16] == [None] * 16  # one dark frame changes nothing
    assert said[18] == BLACK
    assert said[-1] is None


@pytest.mark.parametrize(("make", "words", "least"), [(in_air, IN_AIR, 10), (black, BLACK, 20)])
def test_bad_first_frames_are_called_so(make: Callable[[int], Bad], words: str, least: int) -> None:
    said = [Eye().see(frame(make(seed).image, still=True)).poor for seed in range(20)]
    assert said.count(words) >= least


def test_poor_contact_is_told_once_the_sector_is_known() -> None:
    found = 0
    for seed in range(6):
        eye = Eye()
        lost = poor_contact(seed, lost=0.7)
        lit = np.random.default_rng(seed).integers(40, 200, (*lost.image.shape[:2], 1), np.uint8).repeat(3, axis=2)
        for number in range(20):
            eye.see(frame(np.roll(lit, number, axis=1) * lost.geometry.field[:, :, None], number))
        said = [eye.see(frame(lost.image + np.uint8(0), 20 + number)).poor for number in range(4)]
        found += said[-1] == POOR_CONTACT
    assert found >= 5


def test_a_freeze_is_told_of_live_feeds_alone() -> None:
    image = phantom(4).image
    for still, last in ((False, FROZEN), (True, None)):
        eye = Eye()
        said = [eye.see(frame(image, number, still=still)).poor for number in range(30)]
        assert said[:24] == [None] * 24
        assert said[-1] == last
