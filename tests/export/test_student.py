"""Students cut from a teacher: equal sizes give equal outputs, larger ones are refused, what is cut can be saved."""

from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint, save_checkpoint
from sonoedge.export.prune.importance import spread
from sonoedge.export.prune.sizes import ratio
from sonoedge.export.recipe import StudentShape
from sonoedge.export.student import cut_student

pytestmark = pytest.mark.usefixtures("one_thread")
WHOLE = StudentShape(
    vision_layers=2, vision_mlp_size=96, layers=2, intermediate_size=56, expert_size=20, shared_expert_size=28
)


def outputs(model: EchoVLM) -> torch.Tensor:
    """Logits for a picture and some text."""
    generator = torch.Generator().manual_seed(2)
    patches = torch.randn(16, 1176, generator=generator)
    ids = torch.tensor([[5, 87, 89, 89, 89, 89, 86, 7, 8]])
    positions = torch.arange(9).expand(3, 1, -1)
    with torch.no_grad():
        found: torch.Tensor = model(ids, positions, image_embeds=model.encode_images(patches, [(1, 4, 4)])).logits
    return found


def test_equal_sizes_give_equal_outputs(small_model: EchoVLM) -> None:
    student = cut_student(small_model, WHOLE)
    assert torch.equal(outputs(student), outputs(small_model))
    student.model.layers[0].get_parameter("mlp.gate_proj.weight").data.zero_()
    assert not torch.equal(outputs(student), outputs(small_model)), "the student must own its weights"


@pytest.mark.parametrize(
    ("key", "limit"),
    [
        ("vision_layers", 2),
        ("vision_mlp_size", 96),
        ("layers", 2),
        ("intermediate_size", 56),
        ("expert_size", 20),
        ("shared_expert_size", 28),
    ],
)
def test_sizes_over_the_teachers_are_refused(small_model: EchoVLM, key: str, limit: int) -> None:
    shape = msgspec.structs.replace(WHOLE, **{key: limit + 1})
    with pytest.raises(SonoEdgeError, match=rf"student\.{key} = {limit + 1} exceeds the teacher's {limit}"):
        cut_student(small_model, shape)


def test_a_dense_teacher_is_refused(small_config: ModelConfig) -> None:
    dense = init_model(msgspec.structs.replace(small_config, moe=None), seed=1)
    with pytest.raises(SonoEdgeError, match=r"Qwen2VLForConditionalGeneration, which has no experts"):
        cut_student(dense, WHOLE)


@pytest.mark.parametrize("vision_mlp_size", [1, 37, 52, 95])
def test_a_cut_student_is_saved_and_loaded_as_it_is(
    small_config: ModelConfig, tmp_path: Path, vision_mlp_size: int
) -> None:
    # At this width 52 is among the sizes whose ratio, multiplied back, falls short.
    vision = msgspec.structs.replace(small_config.vision, embed_dim=92, num_heads=1, mlp_ratio=4.0)
    teacher = init_model(msgspec.structs.replace(small_config, vision=vision), seed=3, std=0.15)
    shape = StudentShape(1, vision_mlp_size, 1, 33, 7, 11)
    student = cut_student(teacher, shape).eval()
    save_checkpoint(student, tmp_path / "student")
    loaded = load_checkpoint(tmp_path / "student")
    assert torch.allclose(outputs(loaded), outputs(student), atol=1e-5)
    config = loaded.config
    assert config.moe is not None
    assert (
        StudentShape(
            config.vision.depth,
            config.vision.mlp_size,
            config.num_hidden_layers,
            config.intermediate_size,
            config.moe.moe_intermediate_size,
            config.moe.shared_expert_intermediate_size,
        )
        == shape
    )


@given(st.integers(1, 200), st.integers(4, 120))
def test_every_size_survives_as_a_ratio(size: int, quarter: int) -> None:
    width = 4 * quarter
    assert int(width * ratio(size, width)) == size


def test_the_units_with_the_largest_weights_stay(small_model: EchoVLM) -> None:
    mlp = small_model.model.layers[0].get_submodule("mlp")
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            mlp.get_parameter(f"{name}.weight")[[3, 50]] *= 30
    student = cut_student(small_model, msgspec.structs.replace(WHOLE, intermediate_size=2))
    kept = student.model.layers[0].get_parameter("mlp.gate_proj.weight")
    assert torch.equal(kept, mlp.get_parameter("gate_proj.weight")[[3, 50]])


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_layers_are_spread_evenly(sizes: tuple[int, int]) -> None:
    layers, count = sizes
    kept = spread(layers, count)
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert kept[-1] == layers - 1
    if count > 1:
        steps = [b - a for a, b in pairwise(kept)]
        assert kept[0] == 0
        assert max(steps) - min(steps) <= 1
