"""Which fixed sizes the engines of a bundle are made for, and the shapes of every input at each."""

from collections.abc import Sequence

import msgspec

from sonoedge.bundle import DecoderSpec, ImageSpec
from sonoedge.device_profiles.schema import Buckets
from sonoedge.engine_manifest import Bucket
from sonoedge.errors import SonoEdgeError

LOGITS_ROWS = 64  # rows of one pass that logits are asked for at most: a whole prefill of them would take gigabytes

Shape = tuple[int, ...]


class Extent(msgspec.Struct, frozen=True):
    """The shapes that an input may have in one optimization profile; an engine is tuned for the largest."""

    least: Shape
    most: Shape


def vision_buckets(buckets: Buckets, image: ImageSpec) -> tuple[Bucket, ...]:
    """Patches of one picture: the profile's sizes under the largest picture of the model, and that one."""
    merged = image.merge_size**2
    largest = image.max_pixels // (image.patch_size * image.merge_size) ** 2
    return tuple(Bucket(rows=tokens * merged) for tokens in _up_to(buckets.image_tokens, largest))


def prefill_buckets(buckets: Buckets, context: int, decode_rows: int) -> tuple[Bucket, ...]:
    """Many new tokens, more than `decode_rows`, at every context that holds them."""
    return tuple(
        _bucket(rows, seen)
        for rows in sorted({min(rows, context) for rows in buckets.prefill_tokens})
        for seen in _up_to(buckets.context_tokens, context)
        if decode_rows < rows <= seen
    )


def decode_buckets(buckets: Buckets, context: int, decode_rows: int) -> tuple[Bucket, ...]:
    """One new token in a pass of `decode_rows`, at every context."""
    return tuple(_bucket(decode_rows, seen) for seen in _up_to(buckets.context_tokens, context))


def grown_buckets(buckets: Buckets, context: int, decode_rows: int) -> tuple[Bucket, ...]:
    """Many new tokens and one, each behind a cache of the whole context, which is the past and comes out grown."""
    rows = sorted({decode_rows, *(min(rows, context) for rows in buckets.prefill_tokens)})
    return tuple(_bucket(new, context + new) for new in rows)


def vision_extents(buckets: tuple[Bucket, ...], image: ImageSpec) -> list[dict[str, Extent]]:
    """Shapes of the vision tower's inputs in each bucket: from one patch block more than the next smaller bucket on.

    Every patch attends every other, so a picture cannot be padded: an engine takes each size up to its bucket's.
    """
    values = 3 * image.temporal_patch_size * image.patch_size**2
    least = [image.merge_size**2 + smaller for smaller in (0, *(bucket.rows for bucket in buckets))]
    return [
        {name: Extent((few, n), (bucket.rows, n)) for name, n in (("patches", values), ("places", 2))}
        for few, bucket in zip(least, buckets, strict=False)
    ]


def decoder_extents(buckets: tuple[Bucket, ...], spec: DecoderSpec, cache_tokens: int) -> list[dict[str, Extent]]:
    """Shapes of the decoder's inputs in each bucket, all of them fixed."""
    past = (1, spec.kv_heads, cache_tokens, spec.head_dim)
    return [_fixed(bucket, spec, past) for bucket in buckets]


def cache_tokens(context: int, buckets: tuple[Bucket, ...]) -> int:
    """Tokens of a cache that is written in place: padded rows of the largest pass must not be written past its end."""
    return context + max(bucket.rows for bucket in buckets)


def same_in_all(profiles: Sequence[dict[str, Extent]]) -> dict[str, Shape]:
    """The inputs that have one shape in every optimization profile."""
    first = profiles[0]
    return {
        name: extent.most
        for name, extent in first.items()
        if extent.least == extent.most and all(profile[name] == extent for profile in profiles)
    }


def fit(declared: dict[str, Shape], extents: dict[str, Extent], graph: str) -> dict[str, Extent]:
    """The extents of the inputs that a graph declares, -1 where a size is open.

    Raises SonoEdgeError for an input that is not known, and for a size that the graph fixes otherwise.
    """
    for name, shape in declared.items():
        if name not in extents:
            raise SonoEdgeError(
                f"{graph} has an input {name}, which this SonoEdge does not know: install the one that built the bundle"
            )
        least, most = extents[name].least, extents[name].most
        if len(shape) != len(most) or not all(map(_allows, shape, least, most)):
            raise SonoEdgeError(
                f"{graph} takes {name} of {_words(shape)} and the bundle's sizes need {_words(most)}: build the bundle "
                "again"
            )
    return {name: extents[name] for name in declared}


def _fixed(bucket: Bucket, spec: DecoderSpec, past: Shape) -> dict[str, Extent]:
    shapes: dict[str, Shape] = {
        "input_ids": (1, bucket.rows),
        "positions": (3, 1, bucket.rows),
        "image_embeds": (bucket.images, spec.hidden),
        "attention_bias": (1, 1, bucket.rows, bucket.seen),
        "logits_rows": (bucket.logits,),
        "write_at": (1,),
        **{f"past_{part}_{layer}": past for layer in range(spec.layers) for part in ("key", "value")},
    }
    return {name: Extent(shape, shape) for name, shape in shapes.items()}


def _allows(declared: int, least: int, most: int) -> bool:
    return declared < 0 or declared == least == most


def _words(shape: Shape) -> str:
    return " x ".join("any" if size < 0 else str(size) for size in shape)


def _bucket(rows: int, seen: int) -> Bucket:
    return Bucket(rows=rows, seen=seen, images=rows, logits=min(rows, LOGITS_ROWS))


def _up_to(sizes: tuple[int, ...], largest: int) -> list[int]:
    """The sizes under the largest that a bundle needs, and that one: what it promises is always served."""
    return [*(size for size in sizes if size < largest), largest]
