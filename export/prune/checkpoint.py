"""From a teacher's folder to a student's, whatever its size: a block of it in memory at most, weights row by row."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch

from sonoedge.device_profiles import load_profile
from sonoedge.device_profiles.planning import choose_mode
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec, is_random, open_tokenizer
from sonoedge.export.corpus import Corpus
from sonoedge.export.finished_folder import complete_or_absent
from sonoedge.export.layerwise import calibration_passages
from sonoedge.export.make_checkpoint import BESIDE_WEIGHTS_BYTES
from sonoedge.export.merging import merge_experts, require_small
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import empty_model, open_checkpoint
from sonoedge.export.plan_source import checkpoint_model
from sonoedge.export.prune.axes import LAYERS, VISION_LAYERS, VOCABULARY
from sonoedge.export.prune.card import PrunedStudent, write_card
from sonoedge.export.prune.cutting import cuts
from sonoedge.export.prune.importance import Importance, Kept, choose, kept_of, largest
from sonoedge.export.prune.measured_scores import measured_importance
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.prune.sizes import shape_sizes, student_config, with_kept_blocks
from sonoedge.export.prune.target import fill, over_device, over_parameters
from sonoedge.export.prune.vocabulary import trim_vocabulary
from sonoedge.export.prune.weight_scores import disk_pieces, weight_importance
from sonoedge.export.prune.writing import student_specs, write_student_files, write_student_weights
from sonoedge.export.recipe import Recipe
from sonoedge.export.streamed_model import Passage


def prune_checkpoint(checkpoint: Path, recipe: Recipe, corpus: Corpus | None, out: Path) -> PrunedStudent:
    """Cut the recipe's student out of `checkpoint` into the folder `out`; equal inputs give equal bytes.

    corpus: what importance is measured on, needed where the recipe says so. Raises SonoEdgeError for a recipe without
    [student], sizes or a target that no pruning reaches, and an `out` that is not free; nothing is then left.
    """
    shape = section(recipe)
    teacher, headers = open_checkpoint(checkpoint)
    passages = _passages(checkpoint, teacher, recipe, shape, corpus)
    used = {index for one in passages for index in one.input_ids.flatten().tolist()}
    trimmed = trim_vocabulary(checkpoint, teacher, shape.languages, shape.vocabulary, used) if shape.languages else None
    begin = teacher if trimmed is None else trimmed.config(teacher)
    student = student_config(begin, picked_shape(checkpoint, begin, recipe))
    if shape.expert_method == "merge" and student.moe is not None:
        said, instead = "student.expert_method = 'merge'", "expert_method = 'drop'"
        require_small(teacher, student.moe.num_experts, said=said, instead=instead)
    weights = [(key, tensor.numel()) for key, tensor in empty_model(student).state_dict().items()]
    size = sum(values * headers[key].bytes // headers[key].parameters for key, values in weights)
    with complete_or_absent(out, size + BESIDE_WEIGHTS_BYTES) as folder:
        importance = (
            measured_importance(checkpoint, [msgspec.structs.replace(one) for one in passages])
            if shape.importance == "measured"
            else weight_importance(teacher, disk_pieces(headers), student)
        )
        kept = choose(importance, teacher, student)
        student = with_kept_blocks(student, kept_of(kept, VISION_LAYERS, teacher.vision.depth))
        if trimmed is not None:
            kept[VOCABULARY] = torch.tensor(trimmed.kept)
        cut = cuts((key for key, _ in weights), teacher, kept, importance)
        with TemporaryDirectory(dir=folder) as work:
            merged = {}
            if shape.expert_method == "merge" and _experts(kept):
                merged = merge_experts(checkpoint, passages, _experts_everywhere(importance, student), Path(work))
            specs = student_specs(student, cut, headers)
            write_student_weights(folder, specs, cut, headers, merged)
        write_student_files(checkpoint, student, trimmed, headers["model.embed_tokens.weight"].dtype, folder)
        record = PrunedStudent(
            teacher=checkpoint.resolve().name,
            teacher_parameters=sum(header.parameters for header in headers.values()),
            parameters=sum(spec.values for spec in specs),
            bytes=sum(spec.bytes for spec in specs),
            importance=shape.importance,
            frames=len(passages),
            tokens=importance.tokens,
            teacher_sizes=shape_sizes(teacher) | {"vocabulary": teacher.vocab_size},
            sizes=shape_sizes(student) | {"vocabulary": student.vocab_size},
            layers=tuple(kept_of(kept, LAYERS, teacher.num_hidden_layers)),
            vision_layers=tuple(kept_of(kept, VISION_LAYERS, teacher.vision.depth)),
            influence=_influence(importance, LAYERS),
            vision_influence=_influence(importance, VISION_LAYERS),
            experts=_experts(kept),
            expert_method=shape.expert_method if _experts(kept) else None,
            languages=shape.languages,
            recipe_sha256=recipe.sha256,
            random=is_random(checkpoint),
        )
        write_card(record, None if trimmed is None else trimmed.kept, folder)
    return record


def section(recipe: Recipe) -> StudentShape:
    """What the recipe says of the student; raises SonoEdgeError when it says nothing."""
    if recipe.student is None:
        raise SonoEdgeError("the recipe has no [student]: add it, or take one of the recipes that have")
    return recipe.student


def picked_shape(checkpoint: Path, teacher: ModelConfig, recipe: Recipe) -> StudentShape:
    """[student] with the sizes that its target asks for; `teacher` with the student's vocabulary already."""
    shape = section(recipe)
    if shape.parameters is not None:
        return fill(teacher, shape, over_parameters(shape.parameters))
    if shape.profile is not None:
        device = load_profile(shape.profile)
        use = checkpoint_model(checkpoint, recipe, device).use
        mode = choose_mode(device, shape.mode)
        return fill(teacher, shape, over_device(device, mode, use, shape.memory_bytes, shape.latency_ms))
    return shape


def _passages(
    checkpoint: Path, teacher: ModelConfig, recipe: Recipe, shape: StudentShape, corpus: Corpus | None
) -> list[Passage]:
    """What importance is measured on; none where it is not."""
    if shape.importance == "weights":
        return []
    if corpus is None:
        raise SonoEdgeError("student.importance = 'measured' and there is no data: give --data, or say 'weights'")
    tokenizer = open_tokenizer(checkpoint, teacher)
    return calibration_passages(corpus, tokenizer, image_spec(checkpoint), recipe.calibration, recipe.limits.context)


def _experts(kept: Kept) -> dict[str, tuple[int, ...]]:
    return {axis: tuple(units.tolist()) for axis, units in kept.items() if axis.endswith(".moe.experts")}


def _experts_everywhere(importance: Importance, student: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The experts that would stay in every layer of the teacher: merging passes through those that go, too."""
    assert student.moe is not None
    axes = (axis for axis in importance.scores if axis.endswith(".moe.experts"))
    return {axis: tuple(largest(importance.scores[axis], student.moe.num_experts).tolist()) for axis in axes}


def _influence(importance: Importance, axis: str) -> tuple[float, ...]:
    return tuple(importance.scores[axis].tolist()) if axis in importance.scores else ()
