"""Cuts a student out of its teacher: fewer layers, narrower feed-forwards, every remaining weight kept."""

from __future__ import annotations

import copy
import math

import msgspec
import torch
from torch import Tensor, nn

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.layers import Linear, SwiGLU
from sonoedge.export.models.vision import VisionMlp
from sonoedge.export.recipe import StudentShape


def cut_student(teacher: EchoVLM, shape: StudentShape) -> EchoVLM:
    """A student of `shape` that starts from the teacher's own weights.

    Raises SonoEdgeError naming the size that exceeds the teacher's, and for a teacher without experts.
    """
    config = teacher.config
    if config.moe is None:
        raise SonoEdgeError(
            f"the teacher is {config.architecture}, which has no experts: distil from an EchoVLM checkpoint"
        )
    limits = {
        "vision_layers": config.vision.depth,
        "vision_mlp_size": config.vision.mlp_size,
        "layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "expert_size": config.moe.moe_intermediate_size,
        "shared_expert_size": config.moe.shared_expert_intermediate_size,
    }
    for key, limit in limits.items():
        if getattr(shape, key) > limit:
            raise SonoEdgeError(
                f"student.{key} = {getattr(shape, key)} exceeds the teacher's {limit}: choose at most that"
            )
    student_config = msgspec.structs.replace(
        config,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate_size,
        vision=msgspec.structs.replace(
            config.vision,
            depth=shape.vision_layers,
            mlp_ratio=_ratio(shape.vision_mlp_size, config.vision.embed_dim),
        ),
        moe=msgspec.structs.replace(
            config.moe,
            moe_intermediate_size=shape.expert_size,
            shared_expert_intermediate_size=shape.shared_expert_size,
        ),
    )
    student = copy.deepcopy(teacher)
    student.config = student_config
    student.visual.config = student_config.vision
    student.visual.blocks = spread(student.visual.blocks, shape.vision_layers)
    student.model.layers = spread(student.model.layers, shape.layers)
    for block in student.visual.blocks:
        _narrow_vision_mlp(block.get_submodule("mlp"), shape.vision_mlp_size)
    for layer in student.model.layers:
        _narrow(layer.get_submodule("mlp"), shape.intermediate_size)
        moe = layer.get_submodule("moe")
        moe.config = student_config.moe  # type: ignore[assignment]  # torch types attributes of modules as modules
        _narrow(moe.get_submodule("shared_expert"), shape.shared_expert_size)
        for expert in moe.get_submodule("experts").children():
            _narrow(expert, shape.expert_size)
    return student


def spread(layers: nn.ModuleList, count: int) -> nn.ModuleList:
    """`count` of the layers, evenly spread, the first and the last among them; one alone is the last."""
    if count == 1:
        return nn.ModuleList([layers[-1]])
    return nn.ModuleList(layers[round(i * (len(layers) - 1) / (count - 1))] for i in range(count))


def _ratio(size: int, width: int) -> float:
    """The number that a config names for `size`: readers multiply it by `width` and cut off what follows the point."""
    ratio = size / width
    return ratio if int(width * ratio) == size else math.nextafter(ratio, math.inf)


@torch.no_grad()
def _narrow(mlp: nn.Module, size: int) -> None:
    """Keep the hidden units of a SwiGLU whose weights are largest."""
    assert isinstance(mlp, SwiGLU)
    importance = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1) * mlp.down_proj.weight.norm(dim=0)
    kept = _largest(importance, size)
    mlp.gate_proj = _linear(mlp.gate_proj.weight[kept], None)
    mlp.up_proj = _linear(mlp.up_proj.weight[kept], None)
    mlp.down_proj = _linear(mlp.down_proj.weight[:, kept], None)


@torch.no_grad()
def _narrow_vision_mlp(mlp: nn.Module, size: int) -> None:
    assert isinstance(mlp, VisionMlp)
    kept = _largest(mlp.fc1.weight.norm(dim=1) * mlp.fc2.weight.norm(dim=0), size)
    mlp.fc1, mlp.fc2 = _linear(mlp.fc1.weight[kept], mlp.fc1.bias[kept]), _linear(mlp.fc2.weight[:, kept], mlp.fc2.bias)


def _largest(importance: Tensor, count: int) -> Tensor:
    return importance.topk(count).indices.sort().values


def _linear(weight: Tensor, bias: Tensor | None) -> Linear:
    layer = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer
