"""Phantom clips: one scene that moves, with the truth of every frame."""

from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.calibration.phantom import REGIONS, Lesion, phantom_clip
from sonoedge.errors import SonoEdgeError


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Frames this small gain nothing from OpenCV's threads, which wait for each other on a busy machine."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


@pytest.mark.parametrize("region", REGIONS)
def test_tissue_moves_and_the_truth_follows(region: str) -> None:
    clip = list(phantom_clip(4, 24, fps=12, region=region, kind="oval_solid", quality="good"))
    assert len(clip) == 24
    lesions = [made.truth.lesion for made in clip]
    sides = {lesion.side for lesion in lesions if lesion}
    assert len(sides) == 1
    centres = np.array([lesion.centre_px for lesion in lesions if lesion])
    assert len(centres) == 24
    assert 1 < np.ptp(centres, axis=0).max() < 25
    for made in clip:
        rows, columns = np.nonzero(made.lesion_mask)
        assert made.truth.lesion is not None
        assert made.truth.lesion.centre_px == pytest.approx((columns.mean(), rows.mean()), abs=0.01)
        assert abs(columns.mean() - 111.5) > 0.06 * 224
        grey = made.image[:, :, 0].astype(np.float64)
        ring = made.organ_mask & ~made.lesion_mask
        ring[:, : max(0, columns.min() - 4)] = ring[:, columns.max() + 5 :] = False
        ring[: rows.min()] = ring[rows.max() + 1 :] = False
        assert grey[made.lesion_mask].mean() < grey[ring].mean()


def test_speckle_moves_with_the_tissue() -> None:
    """The frame before, shifted by what the lesion moved, is nearer to the next frame than the unshifted one."""
    clip = list(phantom_clip(8, 40, fps=30, region="liver", kind="cyst", quality="good"))
    first, last = clip[0], max(clip, key=lambda made: _distance(clip[0].truth.lesion, made.truth.lesion))
    assert first.truth.lesion is not None
    assert last.truth.lesion is not None
    dx, dy = (round(b - a) for a, b in zip(first.truth.lesion.centre_px, last.truth.lesion.centre_px, strict=True))
    assert abs(dx) + abs(dy) >= 2
    both = first.organ_mask & last.organ_mask & ~first.lesion_mask & ~last.lesion_mask
    both[:80] = False
    still = _correlation(first.image[both], last.image[both])
    moved = _correlation(np.roll(first.image, (dy, dx), (0, 1))[both], last.image[both])
    assert moved > still + 0.15


def test_a_clip_repeats_itself_and_its_frames_differ() -> None:
    once, again = list(phantom_clip(2, 3)), list(phantom_clip(2, 3))
    assert [made.image.tobytes() for made in once] == [made.image.tobytes() for made in again]
    assert once[0].image.tobytes() != once[1].image.tobytes()


def test_a_wrong_argument_is_named_at_the_call() -> None:
    with pytest.raises(SonoEdgeError, match="region 'knee'"):
        phantom_clip(0, 2, region="knee")
    with pytest.raises(SonoEdgeError, match="fps 0"):
        phantom_clip(0, 2, fps=0)


def _distance(a: Lesion | None, b: Lesion | None) -> float:
    assert a is not None
    assert b is not None
    return float(np.hypot(a.centre_px[0] - b.centre_px[0], a.centre_px[1] - b.centre_px[1]))


def _correlation(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> float:
    return float(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])
