"""Learned projections between student and teacher: for training only, never part of the student's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sonoedge.errors import SonoEdgeError
from sonoedge.export.distilling.losses import relative_distance, router_divergence
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.layers import Linear


def matched_layers(student_layers: int, teacher_layers: int, named: Sequence[int]) -> tuple[int, ...]:
    """The teacher's layer that each layer of the student is matched with: those `named`, or evenly spread ones.

    Raises SonoEdgeError when the named ones are not one for each layer, or not the teacher's.
    """
    if not named:
        if student_layers == 1:
            return (teacher_layers - 1,)
        return tuple(round(i * (teacher_layers - 1) / (student_layers - 1)) for i in range(student_layers))
    if len(named) != student_layers:
        raise SonoEdgeError(
            f"distill.teacher_layers names {len(named)} layers and the student has {student_layers}: name one for each"
        )
    if max(named) >= teacher_layers:
        raise SonoEdgeError(
            f"distill.teacher_layers names layer {max(named)} and the teacher's go from 0 to {teacher_layers - 1}: "
            "name those"
        )
    return tuple(named)


class Matching(nn.Module):
    """Projects hidden states and router logits of each student layer to the widths of its teacher layer."""

    def __init__(self, student: ModelConfig, teacher: ModelConfig, *, hidden: bool, router: bool, seed: int) -> None:
        """hidden, router: what is matched. Raises SonoEdgeError for routers where either model has no experts."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers = student.num_hidden_layers

        def projections(inputs: int, outputs: int) -> nn.ModuleList:
            return nn.ModuleList(_projection(inputs, outputs, generator) for _ in range(layers))

        if hidden:
            self.hidden = projections(student.hidden_size, teacher.hidden_size)
        if router:
            if student.moe is None or teacher.moe is None:
                raise SonoEdgeError("distill.router_weight is for models with experts: set it to 0")
            self.router = projections(student.moe.num_experts, teacher.moe.num_experts)

    def hidden_loss(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """Mean over layers of the relative distance [rows]; mine: of each layer [rows, hidden]."""
        pairs = zip(self.hidden, mine, theirs, strict=True)
        return torch.stack([relative_distance(project(my), their) for project, my, their in pairs]).mean(0)

    def router_loss(self, mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
        """Mean over layers of the divergence [rows] of routing; mine: of each layer [rows, experts]."""
        pairs = zip(self.router, mine, theirs, strict=True)
        return torch.stack([router_divergence(project(my), their) for project, my, their in pairs]).mean(0)


def _projection(inputs: int, outputs: int, generator: torch.Generator) -> Linear:
    """The identity between equal widths, else an isometry as far as the widths allow."""
    layer = Linear(inputs, outputs, bias=False)
    if inputs == outputs:
        nn.init.eye_(layer.weight)
    else:
        nn.init.orthogonal_(layer.weight, generator=generator)
    return layer
