"""What a checkpoint folder says beside its weights: how pictures are prepared, and how text becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from sonoedge.bundle import TOKENIZER_FILE
from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

# What EchoVLM was trained with; a checkpoint may set fewer, never the processor's default.
ECHOVLM_MAX_PIXELS = 196 * 28 * 28
RANDOM_KEY = "sonoedge_random"  # in config.json: true where `make-checkpoint` drew the weights

Count = Annotated[int, msgspec.Meta(gt=0)]
Deviation = Annotated[float, msgspec.Meta(gt=0)]


class _Edges(msgspec.Struct):
    """Bounds of the pixels of a picture, whatever the names say."""

    shortest_edge: Count = 4 * 28 * 28
    longest_edge: Count = ECHOVLM_MAX_PIXELS


class _Sized(msgspec.Struct):
    """Where transformers writes the bounds a second time, or alone."""

    size: _Edges = msgspec.field(default_factory=_Edges)


class _Preprocessor(msgspec.Struct):
    """The keys of preprocessor_config.json that fix the patches."""

    min_pixels: Count
    max_pixels: Count
    patch_size: Count = 14
    temporal_patch_size: Count = 2
    merge_size: Count = 2
    image_mean: tuple[float, float, float] = ImageSpec().mean
    image_std: tuple[Deviation, Deviation, Deviation] = ImageSpec().std


class _Origin(msgspec.Struct):
    """The key of config.json that says where the weights came from."""

    random: bool = msgspec.field(name=RANDOM_KEY, default=False)


def is_random(checkpoint: Path) -> bool:
    """Whether the weights were drawn at random; raises SonoEdgeError when config.json cannot be read."""
    path = checkpoint / "config.json"
    if not path.is_file():
        raise SonoEdgeError(f"{path} does not exist: give the folder of a checkpoint")
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Origin).random
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"{path} cannot be read ({error}): copy it from the checkpoint again") from error


def image_spec(checkpoint: Path) -> ImageSpec:
    """How the checkpoint wants its pictures; raises SonoEdgeError when preprocessor_config.json is wrong."""
    path = checkpoint / "preprocessor_config.json"
    try:
        tree = msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.exists() else {}
        # transformers' quick processors write null for bounds that stand under `size` alone.
        given = {key: value for key, value in tree.items() if value is not None}
        edges = msgspec.convert(given, _Sized).size
        bounds = {"min_pixels": edges.shortest_edge, "max_pixels": edges.longest_edge}
        read = msgspec.convert(bounds | given, _Preprocessor)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"{path} cannot be read ({error}): copy it from the checkpoint again") from error
    smallest = (read.patch_size * read.merge_size) ** 2
    max_pixels = min(read.max_pixels, ECHOVLM_MAX_PIXELS)
    if max_pixels < smallest:
        raise SonoEdgeError(
            f"{path}: max_pixels = {read.max_pixels} and one merged patch has {smallest}: allow at least one"
        )
    return ImageSpec(
        patch_size=read.patch_size,
        temporal_patch_size=read.temporal_patch_size,
        merge_size=read.merge_size,
        min_pixels=min(read.min_pixels, max_pixels),
        max_pixels=max_pixels,
        mean=read.image_mean,
        std=read.image_std,
    )


def open_tokenizer(checkpoint: Path, config: ModelConfig) -> Tokenizer:
    """The checkpoint's tokenizer; raises SonoEdgeError when it is missing or is not the one the model was made with."""
    path = checkpoint / TOKENIZER_FILE
    tokenizer = Tokenizer.from_file(path)
    if len(tokenizer) > config.vocab_size:
        raise SonoEdgeError(
            f"{path} has {len(tokenizer)} tokens and vocab_size = {config.vocab_size}: use the files of one checkpoint"
        )
    if tokenizer.image_pad != config.image_token_id:
        raise SonoEdgeError(
            f"{path} has <|image_pad|> at {tokenizer.image_pad} and image_token_id = {config.image_token_id}: "
            "use the files of one checkpoint"
        )
    return tokenizer
