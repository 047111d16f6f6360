"""The torch model behind the runtime's session interface."""

from pathlib import Path

import numpy as np
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.preprocess import ImageSpec, preprocess

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = np.arange(10, 22, dtype=np.int64)
POSITIONS = np.tile(np.arange(12), (3, 1))


@pytest.fixture
def session(tiny_model: EchoVLM) -> TorchSession:
    return TorchSession(tiny_model, ImageSpec(max_pixels=84 * 84), 40)


def test_pieces_and_rewinding_give_what_one_pass_gives(session: TorchSession) -> None:
    whole = session.extend(IDS, POSITIONS, logits_rows=np.arange(12))
    session.rewind(0)
    first = session.extend(IDS[:5], POSITIONS[:, :5])
    session.extend(np.full(4, 77), POSITIONS[:, :4] + 5)
    session.rewind(5)
    rest = session.extend(IDS[5:], POSITIONS[:, 5:], logits_rows=np.arange(7))
    assert session.length == 12
    assert np.abs(np.concatenate([first, rest]) - whole[4:]).max() < 1e-4


def test_what_is_not_visible_has_no_influence(session: TorchSession) -> None:
    wanted = session.extend(IDS[:4], POSITIONS[:, :4])
    session.rewind(0)
    visible = np.tri(8, dtype=bool)
    visible[4:, :4] = False
    twice = np.concatenate([[70, 71, 72, 73], IDS[:4]])
    positions = np.concatenate([POSITIONS[:, :4], POSITIONS[:, :4]], axis=1)
    assert np.abs(session.extend(twice, positions, visible=visible) - wanted).max() < 1e-4


def test_limits(session: TorchSession) -> None:
    session.extend(IDS, POSITIONS)
    with pytest.raises(SonoEdgeError, match="41 tokens do not fit the context of 40"):
        session.extend(np.full(29, 3), np.tile(np.arange(29) + 12, (3, 1)))
    assert session.length == 12
    for wrong in (-1, 13):
        with pytest.raises(SonoEdgeError, match=f"holds 12 tokens and cannot be rewound to {wrong}"):
            session.rewind(wrong)
    session.close()
    assert session.length == 0


def test_pictures_become_the_models_image_tokens(session: TorchSession, tiny_checkpoint: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (84, 56, 3), np.uint8)
    embeds = session.encode_image(preprocess(picture, session.image))
    assert embeds.shape == (6, 64)
    assert embeds.dtype == np.float32
