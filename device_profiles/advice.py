"""What to change when a model does not fit, with what each change saves."""

from __future__ import annotations

import msgspec

from sonoedge.device_profiles.memory_plan import Use, plan_memory
from sonoedge.device_profiles.planning import Model
from sonoedge.device_profiles.schema import Profile
from sonoedge.device_profiles.shape import ModelShape, weigh

STEPS = 64  # fractions of the model that are tried as its student
WIDTH_MULTIPLE = 16  # what the kernels take
SMALLEST_CONTEXT, SMALLEST_IMAGE = 256, 16  # tokens; below, hints have no room or the picture no detail


class Change(msgspec.Struct, frozen=True):
    """One change by itself."""

    change: str
    serving_saves_bytes: int
    building_saves_bytes: int
    enough: bool  # whether the model would fit with it


class Student(msgspec.Struct, frozen=True):
    """The largest student of the model that fits, all its sizes cut alike; named as in a recipe's [student]."""

    vision_layers: int
    vision_mlp_size: int
    layers: int
    intermediate_size: int
    expert_size: int
    shared_expert_size: int
    parameters: int
    weight_bytes: int
    peak_bytes: int
    shape: ModelShape


class Advice(msgspec.Struct, frozen=True):
    """Everything that would help; `student` is None where none fits or nothing says how much room there is."""

    changes: tuple[Change, ...]
    student: Student | None
    kept_bytes: int  # embeddings and head: a student has the model's vocabulary and width


def advise(model: Model, profile: Profile) -> Advice:
    """Look for what makes a model fit a device that it does not fit."""
    now = plan_memory(model.shape, model.weights, model.use, profile)
    found = []
    for change, use in _changes(model, profile):
        then = plan_memory(model.shape, model.weights, use, profile)
        serving = now.serving_bytes - then.serving_bytes
        if serving > 0:
            building = now.building_bytes - then.building_bytes
            found.append(Change(change, serving, building, enough=then.fits is True))
    weights = model.weights
    kept = weights.embeddings + (0 if weights.tied else weights.head)
    return Advice(tuple(found), _largest_student(model, profile), kept)


def _changes(model: Model, profile: Profile) -> list[tuple[str, Use]]:
    use = model.use
    changes = []
    if use.one_token_form:
        changes.append(
            ('graphs = "memory": one form of the weights', msgspec.structs.replace(use, one_token_form=False))
        )
    shorter = max(use.context // 2, SMALLEST_CONTEXT)
    if shorter < use.context:
        changes.append((f"limits.context = {shorter}", msgspec.structs.replace(use, context=shorter)))
    if not use.int8_cache and profile.backend == "onnxruntime":
        changes.append(('cache = "int8"', msgspec.structs.replace(use, int8_cache=True)))
    sizes = () if profile.buckets is None else profile.buckets.image_tokens
    smaller = max(
        (size for size in sizes if size < use.image_tokens), default=max(use.image_tokens // 2, SMALLEST_IMAGE)
    )
    if smaller < use.image_tokens and model.shape.vision is not None:
        changes.append((f"{smaller} image tokens instead of {use.image_tokens}", _with_image(use, smaller)))
    return changes


def _with_image(use: Use, tokens: int) -> Use:
    prefix = None if use.prefix_tokens is None else use.prefix_tokens - use.image_tokens + tokens
    return msgspec.structs.replace(use, image_tokens=tokens, prefix_tokens=prefix)


def _largest_student(model: Model, profile: Profile) -> Student | None:
    experts, vision = model.shape.experts, model.shape.vision
    if experts is None or vision is None:
        return None  # `sonoedge distill` cuts students of EchoVLM only
    for step in range(STEPS - 1, 0, -1):
        shape = msgspec.structs.replace(
            model.shape,
            layers=_cut(model.shape.layers, step),
            dense_width=_narrow(model.shape.dense_width, step),
            experts=msgspec.structs.replace(
                experts, width=_narrow(experts.width, step), shared_width=_narrow(experts.shared_width, step)
            ),
            vision=msgspec.structs.replace(
                vision, layers=_cut(vision.layers, step), mlp_width=_narrow(vision.mlp_width, step)
            ),
        )
        weights = weigh(shape)
        memory = plan_memory(shape, weights, model.use, profile)
        if memory.fits:
            assert shape.experts is not None
            assert shape.vision is not None
            return Student(
                vision_layers=shape.vision.layers,
                vision_mlp_size=shape.vision.mlp_width,
                layers=shape.layers,
                intermediate_size=shape.dense_width,
                expert_size=shape.experts.width,
                shared_expert_size=shape.experts.shared_width,
                parameters=shape.parameters,
                weight_bytes=weights.stored,
                peak_bytes=memory.peak_bytes,
                shape=shape,
            )
    return None


def _cut(count: int, step: int) -> int:
    return max(1, count * step // STEPS)


def _narrow(width: int, step: int) -> int:
    return min(width, max(WIDTH_MULTIPLE, width * step // STEPS // WIDTH_MULTIPLE * WIDTH_MULTIPLE))
