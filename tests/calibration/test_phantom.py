"""The phantom generator: determinism, truth that agrees with masks and with what is seen, and how varied frames are."""

import time
from collections import Counter
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from sonoedge.calibration.phantom import GEOMETRIES, KINDS, QUALITIES, REGIONS, UNTRAINED_REGIONS, Phantom, phantom
from sonoedge.errors import SonoEdgeError

FRAMES = 600


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Frames this small gain nothing from OpenCV's threads, which wait for each other on a busy machine."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    yield
    cv2.setNumThreads(before)


@pytest.fixture(scope="module")
def frames() -> list[Phantom]:
    """Fresh frames, drawn as training draws them."""
    started = time.perf_counter()
    made = [phantom(seed) for seed in range(FRAMES)]
    print(f"{(time.perf_counter() - started) / FRAMES * 1e3:.1f} ms a frame, probes and noise pools included")
    return made


def test_the_same_seed_gives_the_same_bytes() -> None:
    for seed in (0, 3, 71):
        first, second = phantom(seed), phantom(seed)
        assert first.image.tobytes() == second.image.tobytes()
        assert first.lesion_mask.tobytes() == second.lesion_mask.tobytes()
        assert first.truth == second.truth
    assert phantom(0).image.tobytes() != phantom(1).image.tobytes()


def test_shapes_and_types(frames: list[Phantom]) -> None:
    for made in frames[:50]:
        assert made.image.shape == (224, 224, 3)
        assert made.image.dtype == np.uint8
        assert made.image.flags["C_CONTIGUOUS"]
        assert np.array_equal(made.image[:, :, 0], made.image[:, :, 2])
        assert made.lesion_mask.shape == made.organ_mask.shape == (224, 224)
        assert made.lesion_mask.dtype == made.organ_mask.dtype == np.bool_


def test_truth_agrees_with_the_lesion_mask(frames: list[Phantom]) -> None:
    for made in frames:
        lesion = made.truth.lesion
        if lesion is None:
            assert not made.lesion_mask.any()
            continue
        rows, columns = np.nonzero(made.lesion_mask)
        assert lesion.centre_px == pytest.approx((columns.mean(), rows.mean()), abs=0.01)
        assert lesion.side == ("left" if columns.mean() < 111.5 else "right")
        assert abs(columns.mean() - 111.5) >= 0.08 * 224
        assert lesion.radius_px == pytest.approx(np.sqrt(len(rows) / np.pi), abs=0.01)
        assert 14 <= lesion.radius_px <= 42
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert extent * made.truth.spacing_mm * 0.95 <= lesion.size_mm <= extent * made.truth.spacing_mm * 1.5
        assert 0 < lesion.depth_mm < 224 * made.truth.spacing_mm


def test_lesions_lie_inside_their_organ(frames: list[Phantom]) -> None:
    for made in frames:
        assert made.organ_mask.any()
        assert not np.any(made.lesion_mask & ~made.organ_mask)


def test_shares_of_lesions_sizes_and_qualities(frames: list[Phantom]) -> None:
    lesions = [made.truth.lesion for made in frames if made.truth.lesion is not None]
    assert 0.54 < len(lesions) / FRAMES < 0.66
    assert np.mean([lesion.radius_px < 18 for lesion in lesions]) >= 1 / 3
    assert max(lesion.radius_px for lesion in lesions) > 32
    assert np.mean([made.truth.quality == "poor" for made in frames]) >= 1 / 3
    assert set(Counter(lesion.kind for lesion in lesions)) == set(KINDS)
    assert min(Counter(lesion.kind for lesion in lesions).values()) > 0.18 * len(lesions)
    regions = Counter(made.truth.region for made in frames)
    assert set(regions) == set(REGIONS)
    assert min(regions.values()) > FRAMES / 7 * 0.7
    assert 0.42 < np.mean([lesion.side == "left" for lesion in lesions]) < 0.58


def test_the_probe_does_not_give_the_region_away(frames: list[Phantom]) -> None:
    """Within every region each probe shape occurs, and fields of view of many widths."""
    for region in REGIONS:
        mine = [made for made in frames if made.truth.region == region]
        probes = Counter(made.truth.geometry for made in mine)
        assert set(probes) == set(GEOMETRIES)
        assert min(probes.values()) > 0.15 * len(mine)
        widths = [int(np.ptp(np.nonzero(made.image[:, :, 0].any(axis=0))[0])) for made in mine]
        assert np.percentile(widths, 90) - np.percentile(widths, 10) > 25


def test_lesions_look_like_their_kind(frames: list[Phantom]) -> None:
    """Calcifications are brighter than the organ close by, the others darker; ovals lie, irregular masses stand."""
    for made in frames:
        lesion = made.truth.lesion
        if lesion is None:
            continue
        grey = made.image[:, :, 0].astype(np.float64)
        rows, columns = np.nonzero(made.lesion_mask)
        top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
        height, width = bottom - top + 1, right - left + 1
        near = np.zeros_like(made.lesion_mask)
        near[top : bottom + 1, max(0, left - 5) : right + 6] = True
        around = grey[near & ~made.lesion_mask & made.organ_mask].mean()
        if lesion.kind == "calcification":
            cap = made.lesion_mask.copy()
            cap[top + int(0.45 * height) :] = False
            assert grey[cap].mean() > around + 8
        else:
            assert grey[made.lesion_mask].mean() < around - 4
        if lesion.kind == "oval_solid":
            assert width > 1.25 * height
        if lesion.kind == "irregular_solid":
            assert height > width


def test_a_cyst_enhances_and_a_calcification_shadows_what_lies_behind() -> None:
    for kind, sign in (("cyst", 1), ("calcification", -1), ("irregular_solid", -1)):
        differences = []
        for seed in range(30):
            made = phantom(seed, region="liver", kind=kind, quality="good")
            grey = made.image[:, :, 0].astype(np.float64)
            rows, columns = np.nonzero(made.lesion_mask)
            below = slice(rows.max() + 3, rows.max() + 18)
            half = (columns.max() - columns.min()) // 4
            centre = int(columns.mean())
            behind = grey[below, centre - half : centre + half]
            beside = np.concatenate([grey[below, : columns.min() - 4], grey[below, columns.max() + 5 :]], axis=1)
            differences.append(float(behind[behind > 0].mean() - beside[beside > 0].mean()) * sign)
        assert np.median(differences) > 15


def test_what_is_asked_for_is_drawn() -> None:
    for region in (*REGIONS, *UNTRAINED_REGIONS):
        for kind in (*KINDS, "none"):
            for quality in QUALITIES:
                truth = phantom(5, size=160, region=region, kind=kind, quality=quality).truth
                assert (truth.region, truth.quality, truth.size) == (region, quality, 160)
                assert (truth.lesion.kind if truth.lesion else "none") == kind


def test_a_size_changes_the_scale_and_not_the_scene() -> None:
    small, large = phantom(11, size=168).truth, phantom(11, size=336).truth
    assert (small.region, small.quality, small.lesion is None) == (large.region, large.quality, large.lesion is None)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"region": "knee"}, "region 'knee'"),
        ({"kind": "polyp"}, "kind 'polyp'"),
        ({"quality": "superb"}, "quality 'superb'"),
        ({"size": 20}, "size 20"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(SonoEdgeError, match=words):
        phantom(0, **arguments)  # type: ignore[arg-type]
    with pytest.raises(SonoEdgeError, match="seed -1"):
        phantom(-1)
