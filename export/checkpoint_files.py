"""What a checkpoint folder says beside its weights: how pictures are prepared, and whether its weights are random."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.preprocess import ImageSpec

ECHOVLM_MAX_PIXELS = 196 * 28 * 28  # what EchoVLM was trained with; a checkpoint may set fewer, never the processor's default


class _Preprocessor(msgspec.Struct):
    """The keys of preprocessor_config.json that fix the patches."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = ECHOVLM_MAX_PIXELS
    image_mean: tuple[float, float, float] = ImageSpec().mean
    image_std: tuple[float, float, float] = ImageSpec().std


def image_spec(checkpoint: Path) -> ImageSpec:
    """How the checkpoint wants its pictures; raises SonoEdgeError when preprocessor_config.json contradicts itself."""
    path = checkpoint / "preprocessor_config.json"
    try:
        read = msgspec.json.decode(path.read_bytes(), type=_Preprocessor) if path.exists() else _Preprocessor()
    except msgspec.DecodeError as error:
        raise SonoEdgeError(f"{path} cannot be read ({error}): copy it from the checkpoint again") from None
    smallest = (read.patch_size * read.merge_size) ** 2
    max_pixels = min(read.max_pixels, ECHOVLM_MAX_PIXELS)
    if not smallest <= max_pixels or not 0 < read.min_pixels:
        raise SonoEdgeError(f"{path}: max_pixels = {read.max_pixels} is less than one merged patch of {smallest}: correct it")
    return ImageSpec(
        patch_size=read.patch_size,
        temporal_patch_size=read.temporal_patch_size,
        merge_size=read.merge_size,
        min_pixels=min(read.min_pixels, max_pixels),
        max_pixels=max_pixels,
        mean=read.image_mean,
        std=read.image_std,
    )
