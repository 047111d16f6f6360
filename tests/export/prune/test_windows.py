"""Students of a Qwen2.5-VL: its gated feed-forwards are narrowed, its blocks of full attention stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig, WindowConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint, save_checkpoint
from sonoedge.export.models.rope import Grid
from sonoedge.export.prune.checkpoint import prune_checkpoint
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.recipe import load_recipe
from sonoedge.export.student import cut_student

pytestmark = pytest.mark.usefixtures("one_thread")
GRID: Grid = (1, 6, 10)  # windows of 4 x 4 patches and smaller ones


@pytest.fixture
def windowed(teacher_config: ModelConfig, made: Callable[..., EchoVLM]) -> EchoVLM:
    """A random Qwen2.5-VL of four blocks, the second and the last of full attention."""
    windows = WindowConfig(intermediate_size=44, window_size=56, fullatt_block_indexes=(1, 3))
    vision = msgspec.structs.replace(teacher_config.vision, depth=4, mlp_ratio=4.0, windows=windows)
    return made(msgspec.structs.replace(teacher_config, moe=None, vision=vision))


@torch.no_grad()
def image_tokens(model: EchoVLM) -> Tensor:
    patches = torch.randn(GRID[1] * GRID[2], 1176, generator=torch.Generator().manual_seed(2))
    return model.encode_images(patches, [GRID])


def test_blocks_of_full_attention_take_their_place_along(windowed: EchoVLM, tmp_path: Path, tiny_recipe: Path) -> None:
    save_checkpoint(windowed, tmp_path / "teacher")
    recipe = msgspec.structs.replace(load_recipe(tiny_recipe), student=StudentShape(vision_layers=2))
    record = prune_checkpoint(tmp_path / "teacher", recipe, None, tmp_path / "student")
    assert record.vision_layers == (0, 3)
    student = load_checkpoint(tmp_path / "student")
    assert student.config.vision.windows == WindowConfig(44, 56, (1,))
    assert cut_student(windowed, StudentShape(vision_layers=2)).config == student.config
    blocks = windowed.visual.blocks
    # By hand: the teacher without the two blocks between, each of the others with the reach that it had.
    windowed.visual.blocks = torch.nn.ModuleList([blocks[0], blocks[3]])
    vision = msgspec.structs.replace(windowed.config.vision, depth=2, windows=WindowConfig(44, 56, (1,)))
    windowed.visual.config = vision
    windowed.config = msgspec.structs.replace(windowed.config, vision=vision)
    assert torch.equal(image_tokens(student), image_tokens(windowed))


def test_gated_units_that_write_nothing_go_first(windowed: EchoVLM, tmp_path: Path, tiny_recipe: Path) -> None:
    dead = torch.tensor([0, 7, 13, 30, 43])
    with torch.no_grad():
        for block in windowed.visual.blocks:
            block.get_parameter("mlp.down_proj.weight")[:, dead] = 0
    save_checkpoint(windowed, tmp_path / "teacher")
    shape = StudentShape(vision_mlp_size=44 - len(dead))
    recipe = msgspec.structs.replace(load_recipe(tiny_recipe), student=shape)
    prune_checkpoint(tmp_path / "teacher", recipe, None, tmp_path / "student")
    for student in (load_checkpoint(tmp_path / "student"), cut_student(windowed, shape)):
        assert student.config.vision.mlp_size == 39
        assert student.visual.blocks[0].get_parameter("mlp.gate_proj.bias").shape == (39,)
        difference = (image_tokens(student) - image_tokens(windowed)).abs().max() / image_tokens(windowed).abs().max()
        assert float(difference) < 1e-5
