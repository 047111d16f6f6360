"""Picks the sizes of a student that a recipe leaves open, so that it has so many parameters or fits a device.

For each number of heads, all other open sizes are cut by one factor, and inner widths, the finest sizes, grow back as
far as the target allows; of the students that are nearly the largest, the one whose sizes are cut most alike is taken.
Cutting every dimension somewhat rather than one of them far follows S. Muralidharan et al. (arXiv 2407.14679).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from sonoedge.device_profiles.memory_plan import Use
from sonoedge.device_profiles.planning import Model, make_plan
from sonoedge.device_profiles.schema import Mode, Profile
from sonoedge.device_profiles.shape import weigh
from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.plan_source import shape_of
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.prune.sizes import head_choices, shape_sizes, student_config

STEPS = 256  # fractions of the teacher that are tried
WIDTH_MULTIPLE = 16  # what the kernels take
WIDTHS = ("intermediate_size", "expert_size", "shared_expert_size", "vision_mlp_size")
COUNTS = ("layers", "vision_layers")
NEARLY = 0.95  # of the largest student's parameters: as good as the largest

Over = Callable[[ModelConfig], str | None]  # what is too large in a student, in words, or None


def fill(teacher: ModelConfig, shape: StudentShape, over: Over) -> StudentShape:
    """`shape` with all sizes named: of the largest that `over` finds nothing in, the one cut most evenly.

    Raises SonoEdgeError saying what the smallest reachable student takes, and as `student_config` does.
    """
    asked = [shape]
    if shape.heads is None and shape.hidden_size is None:
        choices = [heads for heads in head_choices(teacher) if _divides(teacher, heads, shape.kv_heads)]
        asked = [msgspec.structs.replace(shape, heads=heads) for heads in choices] or asked
    message = over(student_config(teacher, _scaled(teacher, asked[0], 1, 1)))
    if message is not None:
        raise SonoEdgeError(
            f"{message}: ask for more, name fewer sizes in [student], or trim the vocabulary with the keys languages "
            "and vocabulary"
        )
    found = [filled for one in asked if (filled := _filled(teacher, one, over)) is not None]
    sizes = [shape_of(student_config(teacher, one)).parameters for one in found]
    large = [one for one, size in zip(found, sizes, strict=True) if size >= NEARLY * max(sizes)]
    return min(large, key=lambda one: _unevenness(teacher, one))


def _filled(teacher: ModelConfig, shape: StudentShape, over: Over) -> StudentShape | None:
    """The largest student whose heads are named; None where the smallest is over."""
    step = _largest_step(lambda step: over(student_config(teacher, _scaled(teacher, shape, step, step))))
    if not step:
        return None
    wider = _largest_step(lambda width: over(student_config(teacher, _scaled(teacher, shape, step, max(step, width)))))
    return _scaled(teacher, shape, step, max(step, wider))


def _unevenness(teacher: ModelConfig, shape: StudentShape) -> float:
    whole, sizes = shape_sizes(teacher), shape_sizes(student_config(teacher, shape))
    shares = [math.log(sizes[key] / whole[key]) for key in (*COUNTS, *WIDTHS, "heads") if key in whole]
    return max(shares) - min(shares)


def over_parameters(most: int) -> Over:
    """For students of at most so many parameters."""

    def over(student: ModelConfig) -> str | None:
        found = shape_of(student).parameters
        return None if found <= most else f"student.parameters = {most} and the smallest reachable has {found}"

    return over


def over_device(profile: Profile, mode: Mode, use: Use, memory_bytes: int | None, latency_ms: float | None) -> Over:
    """For students that serve on a device as `use` says, with INT8 weights.

    Raises SonoEdgeError, when called, where the profile lacks the figures that tell.
    """

    def over(student: ModelConfig) -> str | None:
        shape = shape_of(student)
        plan = make_plan(Model("student", shape, weigh(shape), use), profile, mode)
        serving = plan.memory.serving_bytes
        if memory_bytes is not None and serving > memory_bytes:
            return f"student.memory_bytes = {memory_bytes} and the smallest reachable serves in {serving}"
        if memory_bytes is None and plan.fits is None:
            raise SonoEdgeError(f"student.profile = {profile.id!r} does not know its memory: add student.memory_bytes")
        if plan.fits is False:
            peak, room = plan.memory.peak_bytes, plan.memory.room_bytes
            return f"student.profile = {profile.id!r} has {room} bytes free and the smallest reachable takes {peak}"
        if latency_ms is not None:
            expected = None if plan.frame_to_hints is None else plan.frame_to_hints.expected_ms
            if expected is None:
                raise SonoEdgeError(
                    f"student.latency_ms = {latency_ms:g} cannot be planned for, since {profile.id} in the mode "
                    f"{mode.name} does not say how fast it is: state student.parameters or student.memory_bytes instead"
                )
            if expected > latency_ms:
                return f"student.latency_ms = {latency_ms:g} and the smallest reachable takes {expected:.3g} ms"
        return None

    return over


def _largest_step(over: Callable[[int], str | None]) -> int:
    """The largest step that is not over, 0 where none is, by halving: smaller ones never are where larger are not."""
    low, high = 0, STEPS + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if over(middle) is None else (low, middle)
    return low


def _scaled(teacher: ModelConfig, shape: StudentShape, step: int, width_step: int) -> StudentShape:
    """The sizes that `shape` leaves open at step / STEPS of the teacher's, inner widths at width_step / STEPS."""
    sizes = shape_sizes(teacher)
    picked: dict[str, int] = {key: max(1, sizes[key] * step // STEPS) for key in COUNTS}
    for key in (key for key in WIDTHS if key in sizes):
        wide = sizes[key] * width_step // STEPS // WIDTH_MULTIPLE * WIDTH_MULTIPLE
        picked[key] = sizes[key] if width_step == STEPS else min(sizes[key], max(WIDTH_MULTIPLE, wide))
    open_sizes = {key: size for key, size in picked.items() if getattr(shape, key) is None}
    return msgspec.structs.replace(shape, **open_sizes)


def _divides(teacher: ModelConfig, heads: int, kv_heads: int | None) -> bool:
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    return kv_heads is None or (heads % kv_heads == 0 and heads // kv_heads <= group)
