"""Cuts a student out of a teacher that is in memory, as `sonoedge prune` does out of one that is on disk."""

from __future__ import annotations

import torch
from torch import nn

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import empty_model
from sonoedge.export.prune.cutting import cuts
from sonoedge.export.prune.importance import Importance, choose
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.prune.sizes import student_config
from sonoedge.export.prune.target import fill, over_parameters
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
    student = empty_model(student_sizes)
    taken = cuts(student.state_dict(), config, choose(importance, config, student_sizes), importance)
    for key, cut in taken.items():
        owner, _, name = key.rpartition(".")
        weight = nn.Parameter(cut.taken(0, state[cut.source].cpu()))
        student.get_submodule(owner).register_parameter(name, weight)
    return student.train(teacher.training)


def _require_in_memory(shape: StudentShape, importance: Importance | None) -> None:
    asked = {
        "languages": shape.languages,
        "profile": shape.profile,
        "expert_method": shape.expert_method == "merge",
        "importance": shape.importance == "measured" and importance is None,
    }
    for key, wanted in asked.items():
        if wanted:
            raise SonoEdgeError(
                f"student.{key} takes the teacher's folder: run `sonoedge prune` first, and distil into what it gives"
            )
