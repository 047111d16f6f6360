"""The sizes of a student as a config, and which sizes a teacher can be cut to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig, VisionConfig
from sonoedge.export.prune.section import StudentShape

EXPERT_KEYS = ("expert_size", "shared_expert_size", "experts")


def student_config(teacher: ModelConfig, shape: StudentShape) -> ModelConfig:
    """The config of a student of `shape`; targets are not looked at, the vocabulary stays.

    Raises SonoEdgeError naming the size that exceeds the teacher's, heads that do not divide into its KV groups, a
    hidden size that is no whole number of heads, and expert sizes for a teacher without experts.
    """
    _require_at_most(teacher, shape)
    heads = _heads(teacher, shape)
    kv_heads = _kv_heads(teacher, heads, shape.kv_heads)
    hidden = heads * teacher.head_dim
    vision, moe = teacher.vision, teacher.moe
    if moe is not None:
        experts = shape.experts or moe.num_experts
        moe = msgspec.structs.replace(
            moe,
            num_experts=experts,
            num_experts_per_tok=min(moe.num_experts_per_tok, experts),
            moe_intermediate_size=shape.expert_size or moe.moe_intermediate_size,
            shared_expert_intermediate_size=shape.shared_expert_size or moe.shared_expert_intermediate_size,
        )
    return msgspec.structs.replace(
        teacher,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=shape.layers or teacher.num_hidden_layers,
        intermediate_size=shape.intermediate_size or teacher.intermediate_size,
        rms_norm_eps=_eps(teacher, hidden),
        vision=_with_mlp_size(
            msgspec.structs.replace(vision, hidden_size=hidden, depth=shape.vision_layers or vision.depth),
            shape.vision_mlp_size or vision.mlp_size,
        ),
        moe=moe,
    )


def with_kept_blocks(student: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """The config of a student whose vision blocks are those numbered `kept` of its teacher's.

    Blocks of Qwen2.5-VL's tower that attend the whole picture are named by number, and take their place along.
    """
    windows = student.vision.windows
    if windows is None:
        return student
    full = tuple(place for place, block in enumerate(kept) if block in windows.fullatt_block_indexes)
    windows = msgspec.structs.replace(windows, fullatt_block_indexes=full)
    return msgspec.structs.replace(student, vision=msgspec.structs.replace(student.vision, windows=windows))


def shape_sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes of a model by their keys in [student]."""
    sizes = {
        "vision_layers": config.vision.depth,
        "vision_mlp_size": config.vision.mlp_size,
        "layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "hidden_size": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
    }
    if config.moe is not None:
        sizes |= {
            "expert_size": config.moe.moe_intermediate_size,
            "shared_expert_size": config.moe.shared_expert_intermediate_size,
            "experts": config.moe.num_experts,
        }
    return sizes


def head_choices(teacher: ModelConfig) -> dict[int, int]:
    """Every number of heads that a student can have, with the most KV heads that go with it."""
    group, most = teacher.num_attention_heads // teacher.num_key_value_heads, teacher.num_key_value_heads
    choices = {}
    for heads in range(1, teacher.num_attention_heads + 1):
        fitting = [kv for kv in range(1, most + 1) if heads % kv == 0 and heads // kv <= group]
        if fitting:
            choices[heads] = fitting[-1]
    return choices


def ratio(size: int, width: int) -> float:
    """The number that a config names for `size`: readers multiply it by `width` and cut off what follows the point."""
    found = size / width
    return found if int(width * found) == size else math.nextafter(found, math.inf)


def _with_mlp_size(vision: VisionConfig, size: int) -> VisionConfig:
    if size == vision.mlp_size:
        return vision
    if vision.windows is not None:
        windows = msgspec.structs.replace(vision.windows, intermediate_size=size)
        return msgspec.structs.replace(vision, windows=windows)
    return msgspec.structs.replace(vision, mlp_ratio=ratio(size, vision.embed_dim))


def _eps(teacher: ModelConfig, hidden: int) -> float:
    """What is added to a mean over fewer channels so that it weighs as much as before."""
    return teacher.rms_norm_eps * (teacher.hidden_size / hidden)


def _require_at_most(teacher: ModelConfig, shape: StudentShape) -> None:
    limits = shape_sizes(teacher)
    for key in EXPERT_KEYS:
        if key not in limits and getattr(shape, key) is not None:
            raise SonoEdgeError(
                f"student.{key} = {getattr(shape, key)} and the teacher is {teacher.architecture}, which has no "
                "experts: leave the key out, or give an EchoVLM checkpoint"
            )
    for key in limits:
        asked = getattr(shape, key)
        if asked is not None and asked > limits[key]:
            raise SonoEdgeError(f"student.{key} = {asked} exceeds the teacher's {limits[key]}: choose at most that")


def _heads(teacher: ModelConfig, shape: StudentShape) -> int:
    size = teacher.head_dim
    if shape.hidden_size is None:
        return shape.heads or teacher.num_attention_heads
    if shape.heads is not None and shape.heads * size != shape.hidden_size:
        raise SonoEdgeError(
            f"student.hidden_size = {shape.hidden_size} and student.heads = {shape.heads} of {size} values, which make "
            f"{shape.heads * size}: name one of the two keys"
        )
    heads, rest = divmod(shape.hidden_size, size)
    if rest:
        near = f"{size * (heads + 1)}" if heads == 0 else f"{size * heads} or {size * (heads + 1)}"
        raise SonoEdgeError(
            f"student.hidden_size = {shape.hidden_size} is no whole number of heads of {size} values, which M-RoPE's "
            f"sections {list(teacher.mrope_section)} fix: choose {near}"
        )
    return heads


def _kv_heads(teacher: ModelConfig, heads: int, asked: int | None) -> int:
    choices = head_choices(teacher)
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    if asked is None and heads in choices:
        return choices[heads]
    if asked is not None and heads % asked == 0 and heads // asked <= group:
        return asked
    if asked is None:
        raise SonoEdgeError(
            f"student.heads = {heads} does not divide into at most {teacher.num_key_value_heads} KV groups of at most "
            f"{group} heads, as the teacher has them: choose one of {', '.join(map(str, choices))}"
        )
    raise SonoEdgeError(
        f"student.kv_heads = {asked} does not divide {heads} heads into groups of at most {group}, as the teacher has "
        f"them: choose {choices[heads]}"
        if heads in choices
        else f"student.kv_heads = {asked} does not divide {heads} heads into groups of at most {group}, as the teacher "
        f"has them: choose student.heads among {', '.join(map(str, choices))}"
    )
