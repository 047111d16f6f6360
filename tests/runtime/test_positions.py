"""Positions against transformers' get_rope_index."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.positions import mrope_positions

IMAGE, VIDEO, START, END = 101, 102, 103, 104
Grid = tuple[int, int, int]


def sequence(texts: Sequence[int], grids: Sequence[Grid]) -> npt.NDArray[np.int64]:
    """`texts[i]` text tokens before image i, and the last of them after all images."""
    ids: list[int] = []
    for count, (t, h, w) in zip(texts, grids, strict=False):
        ids += [7] * count + [START] + [IMAGE] * (t * h * w // 4) + [END]
    return np.array(ids + [7] * texts[-1], np.int64)


def reference(
    ids: npt.NDArray[np.int64], grids: Sequence[Grid], *, qwen25: bool = False
) -> tuple[npt.NDArray[np.int64], int]:
    """The same through transformers, without weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    config_type: Any = Qwen2_5_VLConfig if qwen25 else Qwen2VLConfig
    model_type: Any = Qwen2_5_VLModel if qwen25 else Qwen2VLModel
    config = config_type(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START)
    model = model_type.__new__(model_type)
    torch.nn.Module.__init__(model)
    model.config = config
    tokens: Any = torch.from_numpy(ids)[None]
    image_grids: Any = torch.tensor(grids) if grids else None
    positions, delta = model.get_rope_index(tokens, image_grids)
    return positions[:, 0].numpy(), int(delta[0, 0]) + len(ids)


grids = st.tuples(st.integers(1, 2), st.integers(1, 6).map(lambda n: 2 * n), st.integers(1, 6).map(lambda n: 2 * n))


@settings(max_examples=60, deadline=None)
@given(st.lists(grids, max_size=4), st.lists(st.integers(0, 5), min_size=5, max_size=5))
def test_agrees_with_transformers(grids: list[Grid], texts: list[int]) -> None:
    ids = sequence([*texts[: len(grids)], texts[4] + 1], grids)
    positions, following = mrope_positions(ids, grids, image_token_id=IMAGE, merge_size=2)
    expected, expected_following = reference(ids, grids)
    np.testing.assert_array_equal(positions, expected)
    assert following == expected_following


@settings(max_examples=60, deadline=None)
@given(st.lists(grids, max_size=4), st.lists(st.integers(0, 5), min_size=5, max_size=5))
def test_still_images_of_qwen25_stand_where_those_of_qwen2_do(grids: list[Grid], texts: list[int]) -> None:
    """Its positions in time are seconds, and a still image has none; what it makes of several frames is not read."""
    stills: list[Grid] = [(1, rows, columns) for _, rows, columns in grids]
    ids = sequence([*texts[: len(stills)], texts[4] + 1], stills)
    positions, following = mrope_positions(ids, stills, image_token_id=IMAGE, merge_size=2)
    expected, expected_following = reference(ids, stills, qwen25=True)
    np.testing.assert_array_equal(positions, expected)
    assert following == expected_following


def test_start_shifts_everything() -> None:
    ids = sequence([3, 2], [(1, 4, 6)])
    first, following = mrope_positions(ids, [(1, 4, 6)], image_token_id=IMAGE, merge_size=2)
    second, later = mrope_positions(ids, [(1, 4, 6)], image_token_id=IMAGE, merge_size=2, start=40)
    np.testing.assert_array_equal(first + 40, second)
    assert later == following + 40


def test_refuses_image_tokens_that_do_not_fit() -> None:
    ids = sequence([3, 2], [(1, 4, 6)])
    with pytest.raises(SonoEdgeError, match="6 image tokens and its 1 images need 4"):
        mrope_positions(ids, [(1, 4, 4)], image_token_id=IMAGE, merge_size=2)
    with pytest.raises(SonoEdgeError, match="interrupted"):
        mrope_positions(np.array([IMAGE, 7, IMAGE]), [(1, 2, 4)], image_token_id=IMAGE, merge_size=2)
