"""Cuts a student out of a teacher that is in memory, as `sonoedge prune` does out of one that is on disk."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import nn

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import empty_model
from sonoedge.export.prune.axes import VISION_LAYERS, VOCABULARY, along
from sonoedge.export.prune.cutting import cuts
from sonoedge.export.prune.importance import Importance, choose, kept_of
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.prune.sizes import student_config, with_kept_blocks
from sonoedge.export.prune.target import fill, over_parameters
from sonoedge.export.prune.vocabulary import TOKEN_ID_FIELDS
from sonoedge.export.prune.weight_scores import memory_pieces, weight_importance


@torch.no_grad()
def cut_student(teacher: EchoVLM, shape: StudentShape, importance: Importance | None = None) -> EchoVLM:
    """A student of `shape` that starts from the teacher's own weights; importance: as measured, None by weights.

    Raises SonoEdgeError naming the size that exceeds the teacher's, and what takes the teacher's folder.
    """
    config = teacher.config
    _require_in_memory(shape, importance)
    if shape.parameters is not None:
        shape = fill(config, shape, over_parameters(shape.parameters))
    student_sizes = student_config(config, shape)
    state = {key: tensor.detach() for key, tensor in teacher.state_dict().items()}
    if importance is None:
        importance = weight_importance(config, memory_pieces(state), student_sizes)
    kept = choose(importance, config, student_sizes)
    student = empty_model(with_kept_blocks(student_sizes, kept_of(kept, VISION_LAYERS, config.vision.depth)))
    taken = cuts(student.state_dict(), config, kept, importance)
    for key, cut in taken.items():
        owner, _, name = key.rpartition(".")
        weight = nn.Parameter(cut.taken(0, state[cut.source].cpu()))
        student.get_submodule(owner).register_parameter(name, weight)
    return student.train(teacher.training)


@torch.no_grad()
def with_vocabulary(teacher: EchoVLM, student: ModelConfig, token_ids: Sequence[int]) -> EchoVLM:
    """The teacher speaking a pruned student's vocabulary, so that logits of both are of the same tokens.

    token_ids: the teacher's id of each token of the student, as `token_ids.json` beside the student says. All other
    weights are shared with `teacher`.
    """
    kept = torch.tensor(token_ids, dtype=torch.int64)
    names = ("vocab_size", *TOKEN_ID_FIELDS)
    config = msgspec.structs.replace(teacher.config, **{name: getattr(student, name) for name in names})
    spoken = empty_model(config)
    for key, weight in teacher.state_dict(keep_vars=True).items():
        owner, _, name = key.rpartition(".")
        axis = along(key, config.head_dim).rows
        same = weight if axis != VOCABULARY else nn.Parameter(weight[kept.to(weight.device)])
        spoken.get_submodule(owner).register_parameter(name, same)
    return spoken.train(teacher.training)


def takes_folder(shape: StudentShape) -> str | None:
    """The key of [student] for which the teacher's folder is needed, None where a teacher in memory will do."""
    asked = {
        "languages": bool(shape.languages),
        "profile": shape.profile is not None,
        "expert_method": shape.expert_method == "merge",
        "importance": shape.importance == "measured",
    }
    return next((key for key, wanted in asked.items() if wanted), None)


def _require_in_memory(shape: StudentShape, importance: Importance | None) -> None:
    key = takes_folder(shape)
    if key is not None and not (key == "importance" and importance is not None):
        raise SonoEdgeError(
            f"student.{key} takes the teacher's folder: use `sonoedge prune` or `sonoedge distill` on it"
        )
