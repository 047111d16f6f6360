"""Preprocessing against transformers' own Qwen2-VL image processor."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.bundle import ImageSpec
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.preprocess import crop_to_sector, preprocess

Noise = Callable[..., npt.NDArray[np.uint8]]
SIZES = [(1, 1), (5, 9), (28, 28), (37, 1000), (1, 200), (200, 1), (168, 168), (225, 317), (240, 320), (1080, 1920)]


def reference(image: npt.NDArray[np.uint8], spec: ImageSpec) -> tuple[npt.NDArray[np.float32], tuple[int, ...]]:
    """The same through transformers."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(
        min_pixels=spec.min_pixels,
        max_pixels=spec.max_pixels,
        patch_size=spec.patch_size,
        temporal_patch_size=spec.temporal_patch_size,
        merge_size=spec.merge_size,
        image_mean=list(spec.mean),
        image_std=list(spec.std),
    )
    made = processor(images=image, return_tensors="np", input_data_format="channels_last")
    return made["pixel_values"], tuple(made["image_grid_thw"][0].tolist())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_agrees_exactly_with_transformers(noise: Noise, size: tuple[int, int], grey: bool) -> None:
    image = noise(*size, grey=grey)
    patches = preprocess(image, ImageSpec())
    values, grid = reference(image, ImageSpec())
    assert patches.grid == grid
    np.testing.assert_array_equal(patches.values, values)


def test_qwen25_takes_the_same_pictures() -> None:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    assert IMAGE_PROCESSOR_MAPPING_NAMES["qwen2_5_vl"] == IMAGE_PROCESSOR_MAPPING_NAMES["qwen2_vl"]


@pytest.mark.parametrize(
    "spec",
    [
        ImageSpec(max_pixels=168 * 168),
        ImageSpec(patch_size=16, merge_size=1, temporal_patch_size=1, min_pixels=32 * 32, max_pixels=64 * 64),
        ImageSpec(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), min_pixels=500 * 500, max_pixels=600 * 600),
    ],
)
def test_agrees_for_other_specs(noise: Noise, spec: ImageSpec) -> None:
    image = noise(150, 211)
    values, grid = reference(image, spec)
    patches = preprocess(image, spec)
    assert patches.grid == grid
    np.testing.assert_array_equal(patches.values, values)


def test_takes_pictures_that_are_not_contiguous(noise: Noise) -> None:
    image = noise(300, 400)
    view = image[20:260, 30:350][::-1]
    assert np.array_equal(preprocess(view, ImageSpec()).values, preprocess(view.copy(), ImageSpec()).values)


@pytest.mark.parametrize("size", [(1, 201), (4021, 20)])
def test_refuses_pictures_as_long_as_transformers_does(size: tuple[int, int]) -> None:
    image = np.zeros((*size, 3), np.uint8)
    with pytest.raises(SonoEdgeError, match="200 times"):
        preprocess(image, ImageSpec())
    with pytest.raises(ValueError, match="aspect ratio"):
        reference(image, ImageSpec())


@pytest.mark.parametrize(
    "image", [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3), np.float32)], ids=str
)
def test_refuses_what_is_not_rgb(image: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(SonoEdgeError, match="uint8"):
        preprocess(image, ImageSpec())


def test_merged_counts_what_the_language_model_sees(noise: Noise) -> None:
    assert preprocess(noise(168, 168), ImageSpec()).merged(2) == 36


def test_crops_to_the_sector_when_there_is_one(noise: Noise) -> None:
    image = noise(100, 120)
    frame = Frame(image, 0, 0, None, "test")
    assert crop_to_sector(frame) is image
    cropped = crop_to_sector(Frame(image, 0, 0, None, "test", (10, 20, 70, 90)))
    np.testing.assert_array_equal(cropped, image[20:90, 10:70])
    assert cropped.flags.c_contiguous
