"""Teachers with units that carry nothing: pruning finds exactly these, and the logits stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint, save_checkpoint
from sonoedge.export.models.shards import read_headers
from sonoedge.export.prune.axes import HIDDEN
from sonoedge.export.prune.cutting import cuts
from sonoedge.export.prune.importance import Importance, choose
from sonoedge.export.prune.measured_scores import measured_importance
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.prune.sizes import student_config
from sonoedge.export.prune.weight_scores import disk_pieces, weight_importance
from sonoedge.export.streamed_model import Passage
from sonoedge.export.student import cut_student

pytestmark = pytest.mark.usefixtures("one_thread")
Outputs = Callable[..., Tensor]
Farthest = Callable[[Tensor, Tensor], float]
BOUND = 1e-5  # of the largest logit


@pytest.fixture
def passages(teacher_config: ModelConfig) -> list[Passage]:
    """Three pictures with text behind them."""
    found = []
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.cat(
            [
                torch.tensor([87, *[teacher_config.image_token_id] * 4, 86]),
                torch.randint(4, 80, (8,), generator=generator),
            ]
        )[None]
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        visible = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        found.append(
            Passage([(1, 4, 4)], ids, positions, visible, torch.randn(16, 1176, generator=generator), region=None)
        )
    return found


def importance_of(teacher: EchoVLM, shape: StudentShape, folder: Path, passages: list[Passage] | None) -> Importance:
    """As measured on `passages`, or by weights (None), read from disk."""
    save_checkpoint(teacher, folder)
    if passages is None:
        return weight_importance(
            teacher.config, disk_pieces(read_headers(folder)), student_config(teacher.config, shape)
        )
    return measured_importance(folder, passages)


@torch.no_grad()
def kill_heads(teacher: EchoVLM, dead: dict[int, list[int]]) -> None:
    for layer, heads in dead.items():
        weight = teacher.model.layers[layer].get_parameter("self_attn.o_proj.weight")
        for head in heads:
            weight[:, 16 * head : 16 * (head + 1)] = 0


@torch.no_grad()
def kill_neurons(teacher: EchoVLM, owner: str, dead: Tensor, out: str = "down_proj") -> None:
    teacher.get_parameter(f"{owner}.{out}.weight")[:, dead] = 0


@torch.no_grad()
def kill_channels(teacher: EchoVLM, dead: Tensor) -> None:
    teacher.model.embed_tokens.weight[:, dead] = 0
    teacher.get_parameter("visual.merger.mlp.2.weight")[dead] = 0
    teacher.get_parameter("visual.merger.mlp.2.bias")[dead] = 0
    for name, parameter in teacher.model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter[dead] = 0


def picked(count: int, of: int, seed: int) -> Tensor:
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].sort().values


BOTH = pytest.mark.parametrize("measured", [True, False], ids=["measured", "weights"])


@BOTH
def test_dead_channels_go_with_the_heads_that_are_dead(
    teacher: EchoVLM, tmp_path: Path, passages: list[Passage], measured: bool, outputs: Outputs, farthest: Farthest
) -> None:
    # Four heads of two groups stay, so one head of each group goes, and 32 channels.
    dead = {0: [0, 4], 1: [2, 3], 2: [1, 5], 3: [0, 3]}
    channels = picked(32, 96, seed=1)
    kill_heads(teacher, dead)
    kill_channels(teacher, channels)
    before = outputs(teacher)
    shape = StudentShape(hidden_size=64)
    importance = importance_of(teacher, shape, tmp_path / "teacher", passages if measured else None)
    kept = choose(importance, teacher.config, student_config(teacher.config, shape))
    assert set(kept[HIDDEN].tolist()).isdisjoint(channels.tolist())
    for layer, heads in dead.items():
        stay = kept[f"model.layers.{layer}.self_attn.heads"].tolist()
        assert stay == [head for head in range(6) if head not in heads]
    student = cut_student(teacher, shape, importance)
    assert (student.config.num_attention_heads, student.config.num_key_value_heads) == (4, 2)
    assert farthest(outputs(student), before) < BOUND


@BOTH
def test_dead_groups_of_heads_go_whole(
    teacher: EchoVLM, tmp_path: Path, passages: list[Passage], measured: bool, outputs: Outputs, farthest: Farthest
) -> None:
    kill_heads(teacher, {0: [0, 1, 2], 1: [3, 4, 5], 2: [0, 1, 2], 3: [3, 4, 5]})
    channels = picked(48, 96, seed=2)
    kill_channels(teacher, channels)
    before = outputs(teacher)
    shape = StudentShape(heads=3)
    importance = importance_of(teacher, shape, tmp_path / "teacher", passages if measured else None)
    kept = choose(importance, teacher.config, student_config(teacher.config, shape))
    assert [kept[f"model.layers.{layer}.self_attn.kv_heads"].tolist() for layer in range(4)] == [[1], [0], [1], [0]]
    assert farthest(outputs(cut_student(teacher, shape, importance)), before) < BOUND


@BOTH
def test_dead_neurons_are_found_everywhere(
    teacher: EchoVLM, tmp_path: Path, passages: list[Passage], measured: bool, outputs: Outputs, farthest: Farthest
) -> None:
    dead = {f"visual.blocks.{block}.mlp": picked(40, 96, seed=block) for block in range(3)}
    for layer in range(4):
        name = f"model.layers.{layer}"
        dead[f"{name}.mlp"] = picked(24, 56, seed=layer)
        dead[f"{name}.moe.shared_expert"] = picked(8, 28, seed=layer + 10)
        dead |= {f"{name}.moe.experts.{e}": picked(12, 20, seed=10 * layer + e) for e in range(4)}
    for owner, units in dead.items():
        kill_neurons(teacher, owner, units, "fc2" if owner.startswith("visual") else "down_proj")
    before = outputs(teacher)
    shape = StudentShape(vision_mlp_size=56, intermediate_size=32, expert_size=8, shared_expert_size=20)
    importance = importance_of(teacher, shape, tmp_path / "teacher", passages if measured else None)
    kept = choose(importance, teacher.config, student_config(teacher.config, shape))
    assert kept.keys() == dead.keys()
    for owner, units in dead.items():
        assert set(kept[owner].tolist()).isdisjoint(units.tolist()), owner
    assert farthest(outputs(cut_student(teacher, shape, importance)), before) < BOUND


def test_dead_experts_are_found_by_routing(
    teacher: EchoVLM, tmp_path: Path, passages: list[Passage], outputs: Outputs, farthest: Farthest
) -> None:
    # One channel is the same everywhere, so that a router can shut an expert out for every token.
    with torch.no_grad():
        kill_channels(teacher, torch.tensor([7]))
        teacher.model.embed_tokens.weight[:, 7] = 3
        teacher.get_parameter("visual.merger.mlp.2.bias")[7] = 3
        dead = [1, 3, 0, 2]
        for layer, expert in enumerate(dead):
            teacher.get_parameter(f"model.layers.{layer}.post_attention_layernorm.weight")[7] = 1
            teacher.get_parameter(f"model.layers.{layer}.moe.gate.weight")[expert, 7] = -1e4
    before = outputs(teacher)
    shape = StudentShape(experts=3, importance="measured")
    importance = importance_of(teacher, shape, tmp_path / "teacher", passages)
    kept = choose(importance, teacher.config, student_config(teacher.config, shape))
    for layer, expert in enumerate(dead):
        assert kept[f"model.layers.{layer}.moe.experts"].tolist() == [e for e in range(4) if e != expert]
    student = cut_student(teacher, shape, importance)
    assert student.config.moe is not None
    assert student.config.moe.num_experts == 3
    assert farthest(outputs(student), before) < BOUND


@torch.no_grad()
def test_layers_that_change_nothing_go_first(
    teacher: EchoVLM, tmp_path: Path, passages: list[Passage], outputs: Outputs
) -> None:
    for layer in (1, 2):
        for name, parameter in teacher.model.layers[layer].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    for name, parameter in teacher.visual.blocks[0].named_parameters():
        if name.startswith(("attn.proj.", "mlp.fc2.")):
            parameter.zero_()
    before = outputs(teacher)
    shape = StudentShape(layers=2, vision_layers=2)
    importance = importance_of(teacher, shape, tmp_path / "teacher", passages)
    kept = choose(importance, teacher.config, student_config(teacher.config, shape))
    assert kept["model.layers"].tolist() == [0, 3]
    assert kept["visual.blocks"].tolist() == [1, 2]
    assert importance.scores["model.layers"][1] < 1e-6 < importance.scores["model.layers"][0]
    assert torch.equal(outputs(cut_student(teacher, shape, importance)), before)


def test_everything_dead_at_once(
    teacher: EchoVLM, tmp_path: Path, passages: list[Passage], outputs: Outputs, farthest: Farthest
) -> None:
    kill_heads(teacher, {layer: [2, 3] for layer in range(4)})
    kill_channels(teacher, picked(32, 96, seed=3))
    for layer in range(4):
        kill_neurons(teacher, f"model.layers.{layer}.mlp", picked(30, 56, seed=layer))
        kill_neurons(teacher, f"model.layers.{layer}.moe.shared_expert", picked(8, 28, seed=layer))
    with torch.no_grad():
        for name, parameter in teacher.model.layers[1].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    before = outputs(teacher)
    shape = StudentShape(layers=3, heads=4, intermediate_size=26, shared_expert_size=20)
    importance = importance_of(teacher, shape, tmp_path / "teacher", passages)
    student = cut_student(teacher, shape, importance)
    save_checkpoint(student, tmp_path / "student")
    assert farthest(outputs(load_checkpoint(tmp_path / "student")), before) < BOUND


def test_what_leaves_with_live_channels_is_taken_off_the_norms(
    teacher: EchoVLM, tmp_path: Path, passages: list[Passage]
) -> None:
    """A norm gives the channels that stay as large as before, on the average of what was measured."""
    shape = StudentShape(heads=4)
    importance = importance_of(teacher, shape, tmp_path / "teacher", passages)
    student = student_config(teacher.config, shape)
    kept = choose(importance, teacher.config, student)
    norm = "model.layers.2.input_layernorm.weight"
    factor = cuts([norm], teacher.config, kept, importance)[norm].factor
    energy = importance.energies[norm]
    stay = energy[kept[HIDDEN]]
    assert factor is not None
    assert factor / float(stay.mean().sqrt()) == pytest.approx(1 / float(energy.mean().sqrt()), rel=1e-9)
    assert student.rms_norm_eps == pytest.approx(teacher.config.rms_norm_eps * 1.5)


def test_a_dense_teacher_is_pruned_like_any(
    small_config: ModelConfig, tmp_path: Path, outputs: Outputs, farthest: Farthest, made: Callable[..., EchoVLM]
) -> None:
    teacher = made(msgspec.structs.replace(small_config, moe=None))
    kill_neurons(teacher, "model.layers.0.mlp", picked(20, 56, seed=0))
    kill_neurons(teacher, "model.layers.1.mlp", picked(20, 56, seed=1))
    student = cut_student(teacher, StudentShape(intermediate_size=36))
    assert farthest(outputs(student), outputs(teacher)) < BOUND
