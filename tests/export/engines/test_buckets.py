"""Buckets: whatever a profile says, what the bundle promises is served, and nothing is made that could not be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonoedge.bundle import DecoderSpec, ImageSpec
from sonoedge.device_profiles.schema import Buckets
from sonoedge.engine_manifest import Bucket
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.buckets import (
    Extent,
    cache_tokens,
    decode_buckets,
    decoder_extents,
    fit,
    grown_buckets,
    prefill_buckets,
    same_in_all,
    vision_buckets,
    vision_extents,
)


def ascending(largest: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(1, largest), min_size=1, max_size=4).map(lambda sizes: tuple(sorted(sizes)))


@st.composite
def profiles(draw: st.DrawFn) -> Buckets:
    contexts = draw(ascending(8192))
    prefill = draw(ascending(contexts[-1]))
    return Buckets(draw(ascending(1024)), prefill, contexts)


contexts = st.integers(2, 8192)
ROWS = 2  # of a pass for one token
SPEC = DecoderSpec(
    hidden=8, layers=2, heads=2, kv_heads=1, head_dim=4, vocab=16, context=640, image_token_id=3, eos_token_ids=(1,)
)


@given(profiles(), contexts)
def test_one_token_fits_wherever_the_context_has_room(buckets: Buckets, context: int) -> None:
    decode = decode_buckets(buckets, context, ROWS)
    assert decode[-1].seen == context
    assert all(bucket.rows == ROWS for bucket in decode)
    assert [bucket.seen for bucket in decode] == sorted({bucket.seen for bucket in decode})


@given(profiles(), contexts)
def test_passes_fit_the_context_and_none_is_made_twice(buckets: Buckets, context: int) -> None:
    prefill = prefill_buckets(buckets, context, ROWS)
    assert len(set(prefill)) == len(prefill)
    for bucket in prefill:
        assert ROWS < bucket.rows <= bucket.seen <= context
        assert bucket.images == bucket.rows
        assert 1 <= bucket.logits <= bucket.rows
    asked = {min(rows, context) for rows in buckets.prefill_tokens} - {*range(ROWS + 1)}
    assert {bucket.rows for bucket in prefill} == asked
    assert not asked or prefill[-1].seen == context


@given(profiles(), contexts)
def test_padded_rows_of_any_pass_stay_inside_the_cache(buckets: Buckets, context: int) -> None:
    every = prefill_buckets(buckets, context, ROWS) + decode_buckets(buckets, context, ROWS)
    last = context - 1  # the last place where a token may stand
    assert all(last + bucket.rows <= cache_tokens(context, every) for bucket in every)


@given(profiles(), contexts)
def test_a_cache_that_grows_holds_the_context_before_every_pass(buckets: Buckets, context: int) -> None:
    grown = grown_buckets(buckets, context, ROWS)
    assert grown[0].rows == min(ROWS, grown[0].rows)
    assert all(bucket.seen - bucket.rows == context for bucket in grown)


@given(profiles(), st.integers(1, 2000))
def test_every_size_of_picture_has_one_engine_profile(buckets: Buckets, tokens: int) -> None:
    image = ImageSpec(max_pixels=tokens * 28 * 28)
    made = vision_buckets(buckets, image)
    extents = vision_extents(made, image)
    assert made[-1].rows == tokens * 4
    for size in range(4, tokens * 4 + 1, 4):
        holding = [e for e in extents if e["patches"].least[0] <= size <= e["patches"].most[0]]
        assert len(holding) == 1
        assert holding[0]["places"] == Extent((holding[0]["patches"].least[0], 2), (holding[0]["patches"].most[0], 2))


def test_what_all_profiles_share_is_fixed_before_the_graph_is_read() -> None:
    buckets = (Bucket(32, 512, 32, 32), Bucket(256, 512, 256, 64))
    same = same_in_all(decoder_extents(buckets, SPEC, 896))
    assert same["past_value_1"] == (1, 1, 896, 4)
    assert same["write_at"] == (1,)
    assert "input_ids" not in same


def test_a_graph_with_other_sizes_is_refused() -> None:
    extents = decoder_extents((Bucket(32, 512, 32, 32),), SPEC, 672)[0]
    assert fit({"input_ids": (1, -1)}, extents, "decoder.onnx") == {"input_ids": Extent((1, 32), (1, 32))}
    with pytest.raises(SonoEdgeError, match=r"decoder.onnx takes image_embeds of any x 9 and the .* need 32 x 8"):
        fit({"image_embeds": (-1, 9)}, extents, "decoder.onnx")
    with pytest.raises(SonoEdgeError, match="takes input_ids of 1 and"):
        fit({"input_ids": (1,)}, extents, "decoder.onnx")
    with pytest.raises(SonoEdgeError, match="has an input last_token, which this SonoEdge does not know"):
        fit({"last_token": (1,)}, extents, "decoder.onnx")
