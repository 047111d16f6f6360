"""How much each unit of a model matters, by axis, and which units a student keeps for it.

Sources: block influence, X. Men et al., "ShortGPT" (arXiv 2403.03853); widths and heads by activations, S. Muralidharan
et al., "Compact language models via pruning and knowledge distillation" (arXiv 2407.14679); a column of weights times
the activations that it meets, M. Sun et al., "A simple and effective pruning approach for large language models"
(arXiv 2306.11695); heads with their groups, X. Ma et al., "LLM-Pruner" (arXiv 2305.11627).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig
from sonoedge.export.prune.axes import HIDDEN, LAYERS, VISION_LAYERS, inner_axes

ROUNDING = 1e-6  # of a cosine: what a layer that changes nothing seems to change
Kept = Mapping[str, Tensor]  # int64 indices in order, by axis; an axis that is not there stays whole


class Importance(msgspec.Struct, frozen=True):
    """Scores of units, larger for those that matter more.

    scores: float64 [units] by axis. energies: by the key of each norm, float64 [hidden], the mean square of every
    channel before it; empty where nothing was measured. tokens: on how many the scores were measured, 0 for weights.
    """

    scores: dict[str, Tensor]
    energies: dict[str, Tensor]
    tokens: int = 0

    def energy(self, norm: str) -> Tensor:
        """The share of each channel in what a norm divides by, up to a factor: as measured, else by weights."""
        return self.energies.get(norm, self.scores[HIDDEN])


def choose(importance: Importance, teacher: ModelConfig, student: ModelConfig) -> dict[str, Tensor]:
    """The units of every axis that is longer in `teacher` than in `student`; the most important ones stay."""
    kept = depth(importance, teacher, student)
    scores = importance.scores
    for axis, count in cut_axes(teacher, student, kept).items():
        if axis.endswith(".self_attn.heads"):
            heads, groups = _heads(scores[axis], teacher, student)
            kept |= {axis: heads, axis.replace(".heads", ".kv_heads"): groups}
        else:
            kept[axis] = largest(scores[axis], count)
    return kept


def depth(importance: Importance | None, teacher: ModelConfig, student: ModelConfig) -> dict[str, Tensor]:
    """The layers and vision blocks that stay: those of most influence, evenly spread ones where it is not known."""
    kept = {}
    for axis, whole, count in (
        (LAYERS, teacher.num_hidden_layers, student.num_hidden_layers),
        (VISION_LAYERS, teacher.vision.depth, student.vision.depth),
    ):
        if count < whole:
            known = None if importance is None else importance.scores.get(axis)
            kept[axis] = torch.tensor(spread(whole, count)) if known is None else largest(_last_first(known), count)
    return kept


def spread(whole: int, count: int) -> list[int]:
    """`count` of `whole` indices, evenly spread, the first and the last among them; one alone is the last."""
    if count == 1:
        return [whole - 1]
    return [round(index * (whole - 1) / (count - 1)) for index in range(count)]


def cut_axes(teacher: ModelConfig, student: ModelConfig, depths: Kept) -> dict[str, int]:
    """How many units stay of each axis that is cut within the layers that stay; KV heads go with their heads."""
    found: dict[str, int] = {}
    if student.hidden_size < teacher.hidden_size:
        found[HIDDEN] = student.hidden_size
    of_student = {axis.partition(f"{LAYERS}.0.")[2]: size for axis, size in inner_axes(student, 0).items()}
    for layer in kept_of(depths, LAYERS, teacher.num_hidden_layers):
        if student.num_attention_heads < teacher.num_attention_heads or (
            student.num_key_value_heads < teacher.num_key_value_heads
        ):
            found[f"{LAYERS}.{layer}.self_attn.heads"] = student.num_attention_heads
        if teacher.moe is not None and student.moe is not None and student.moe.num_experts < teacher.moe.num_experts:
            found[f"{LAYERS}.{layer}.moe.experts"] = student.moe.num_experts
        for axis, size in inner_axes(teacher, layer).items():
            leaf = axis.removeprefix(f"{LAYERS}.{layer}.")
            # All experts are equally wide, and their numbers may go beyond the student's.
            count = of_student.get(leaf, of_student.get("moe.experts.0", size))
            if count < size:
                found[axis] = count
    if student.vision.mlp_size < teacher.vision.mlp_size:
        for block in kept_of(depths, VISION_LAYERS, teacher.vision.depth):
            found[f"{VISION_LAYERS}.{block}.mlp"] = student.vision.mlp_size
    return found


def norm_factor(importance: Importance, kept: Kept, norm: str) -> float:
    """What the scale of a norm is multiplied by, so that the channels that stay come out as large as before.

    A norm divides by the root of the mean over its channels. When those that go carry nothing, the mean over the rest
    is larger by whole / kept; what they do carry is missing from the mean, so their share is taken off again.
    """
    channels = kept[HIDDEN]
    energy = importance.energy(norm)
    whole = float(energy.sum())
    share = float(energy[channels].sum()) / whole if whole else 1.0
    return math.sqrt(len(energy) / len(channels) * share)


def _last_first(influence: Tensor) -> Tensor:
    """Influence by which the last layer, if it does anything, goes last: nothing after it could stand in for it.

    Source: A. Gromov et al., "The unreasonable ineffectiveness of the deeper layers" (arXiv 2403.17887).
    """
    above = influence.clone()
    if above[-1] > ROUNDING:
        above[-1] = torch.inf
    return above


def kept_of(kept: Kept, axis: str, whole: int) -> list[int]:
    """The indices that stay of an axis of `whole` units."""
    found: list[int] = kept[axis].tolist() if axis in kept else list(range(whole))
    return found


def largest(scores: Tensor, count: int) -> Tensor:
    """The indices of the `count` largest scores, in their order; of equals, the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _heads(scores: Tensor, teacher: ModelConfig, student: ModelConfig) -> tuple[Tensor, Tensor]:
    """The heads and KV heads that stay: the groups whose best heads matter most, and those heads of them."""
    groups, each = student.num_key_value_heads, student.num_attention_heads // student.num_key_value_heads
    by_group = scores.view(teacher.num_key_value_heads, -1)  # [kv_heads, group]
    best = [largest(of_group, each) for of_group in by_group]
    worth = torch.stack([of_group[picked].sum() for of_group, picked in zip(by_group, best, strict=True)])
    kept = largest(worth, groups)
    heads = torch.cat([best[group] + group * by_group.shape[1] for group in kept.tolist()])
    return heads, kept
