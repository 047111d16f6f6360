"""How the tokens of a call are cut into the sizes of the engines, padded and masked."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonoedge.engine_manifest import Bucket
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sessions.bucketing import Chunk, logits_runs, padded, plan_chunks
from sonoedge.runtime.sessions.masks import HIDDEN, attention_bias

NONE = np.zeros(0, np.int64)


def bucket(rows: int, seen: int, logits: int = 1) -> Bucket:
    return Bucket(rows=rows, seen=seen, images=rows, logits=logits)


def room(_bucket: Bucket, _length: int) -> bool:
    return True


ORIN = (*(bucket(r, s, min(r, 64)) for r in (16, 64, 256) for s in (512, 1024)), bucket(1, 512), bucket(1, 1024))


def sizes(tokens: int, length: int = 0, rows: "np.ndarray[tuple[int], np.dtype[np.int64]]" = NONE) -> list[object]:
    """(tokens, rows, seen) of every chunk."""
    chunks = plan_chunks(tokens, length, rows, ORIN, room)
    return [(len(chunk), ORIN[chunk.bucket].rows, ORIN[chunk.bucket].seen) for chunk in chunks]


def test_the_fewest_runs_and_the_smallest_that_hold_them() -> None:
    assert sizes(1) == [(1, 1, 512)]
    assert sizes(2) == [(2, 16, 512)]
    assert sizes(17) == [(17, 64, 512)]
    assert sizes(256) == [(256, 256, 512)]
    assert sizes(300) == [(256, 256, 512), (44, 64, 512)]
    assert sizes(257) == [(256, 256, 512), (1, 1, 512)]
    assert sizes(20, 500) == [(20, 64, 1024)]
    assert sizes(12, 500) == [(12, 16, 512)]  # padding beyond what attention reads is never read
    assert sizes(600, 200) == [(256, 256, 512), (256, 256, 1024), (88, 256, 1024)]


def test_a_larger_engine_that_gives_all_logits_at_once_runs() -> None:
    few, many = bucket(4, 64, 1), bucket(8, 64, 8)
    assert plan_chunks(3, 0, np.arange(3), (few, many), room) == (Chunk(0, 3, 1),)
    assert plan_chunks(3, 0, np.array([2]), (few, many), room) == (Chunk(0, 3, 0),)


def test_padding_never_goes_past_the_end_of_the_cache() -> None:
    chunks = plan_chunks(40, 984, NONE, ORIN, lambda bucket, length: length + bucket.rows <= 1024)
    assert [(len(chunk), ORIN[chunk.bucket].rows) for chunk in chunks] == [(16, 16), (16, 16), *[(1, 1)] * 8]


def test_what_no_engine_reads_is_refused() -> None:
    with pytest.raises(SonoEdgeError, match="no engine reads 1025 tokens: run `sonoedge engine` on this bundle again"):
        plan_chunks(2, 1023, NONE, ORIN, room)


@given(data=st.data())
def test_every_token_runs_once_and_every_row_is_answered(data: st.DataObject) -> None:
    count = st.integers(1, 40)
    buckets = tuple(
        bucket(rows, max(seen, rows), data.draw(st.integers(1, rows)))
        for rows, seen in data.draw(st.lists(st.tuples(count, count), min_size=1, max_size=5))
    )
    reach = max(bucket.seen for bucket in buckets)
    length = data.draw(st.integers(0, reach - 1))
    tokens = data.draw(st.integers(1, reach - length))
    rows = np.array(data.draw(st.lists(st.integers(0, tokens - 1), max_size=50)), np.int64)
    chunks = plan_chunks(tokens, length, rows, buckets, room)
    assert [(a.stop, b.start) for a, b in itertools.pairwise(chunks) if a.stop != b.start] == []
    assert (chunks[0].start, chunks[-1].stop) == (0, tokens)
    answered = np.full(len(rows), -1)
    for chunk in chunks:
        chosen = buckets[chunk.bucket]
        assert 1 <= len(chunk) <= chosen.rows
        assert length + chunk.stop <= chosen.seen
        for run in logits_runs(chunk, chosen, rows):
            assert run.rows.shape == (chosen.logits,)
            assert ((run.rows >= 0) & (run.rows < len(chunk))).all()
            assert (answered[run.answers] == -1).all()
            answered[run.answers] = chunk.start + run.rows[: len(run.answers)]
    assert np.array_equal(answered, rows)
    # Nothing shorter: no run could have taken more.
    for chunk in chunks:
        most = max(min(b.rows, b.seen - length - chunk.start, tokens - chunk.start) for b in buckets)
        assert len(chunk) == most


def test_padding_repeats_the_last() -> None:
    assert padded(np.array([[5, 7]]), 4).tolist() == [[5, 7, 7, 7]]
    assert padded(np.array([[[1]], [[2]], [[3]]]), 2).tolist() == [[[1, 1]], [[2, 2]], [[3, 3]]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_bias_hides_what_is_not_seen_and_padding_sees_what_the_last_row_sees(dtype: type[np.floating]) -> None:
    visible = np.array([[True, False, True], [False, True, True]])
    bias = attention_bias(visible, np.array([0, 2, 5]), (4, 7), dtype)
    assert bias.shape == (1, 1, 4, 7)
    assert bias.dtype == dtype
    assert [np.flatnonzero(row == 0).tolist() for row in bias[0, 0]] == [[0, 5], [2, 5], [2, 5], [2, 5]]
    hidden = dtype(HIDDEN[np.dtype(dtype).name])
    assert set(bias.ravel().tolist()) == {0.0, float(hidden)}
    with np.errstate(over="raise", under="ignore"):
        assert np.isfinite(hidden + dtype(-2000))  # a score, added in the same type
        assert np.exp(hidden + dtype(2000)) == 0
