"""A plan: whether a model fits a device, and how long its stages take there."""

from __future__ import annotations

from typing import Literal

import msgspec

from sonoedge.device_profiles.memory_plan import Memory, Use, bucket, cache_bits, plan_memory
from sonoedge.device_profiles.roofline import StageTime, decoder_work, stage_time, vision_work
from sonoedge.device_profiles.schema import Mode, Profile
from sonoedge.device_profiles.shape import ModelShape, Weights
from sonoedge.errors import SonoEdgeError

StageName = Literal["vision", "prefill", "hints", "question", "decode"]


class Model(msgspec.Struct, frozen=True):
    """What is planned for."""

    name: str
    shape: ModelShape
    weights: Weights
    use: Use


class Stage(msgspec.Struct, frozen=True):
    """One run of a stage; `tokens` as asked for, `rows` as computed: static sizes are filled up."""

    name: StageName
    tokens: int
    rows: int
    time: StageTime


class Latency(msgspec.Struct, frozen=True):
    """Several stages in a row, without what is done on the CPU before and after them."""

    at_least_ms: float | None
    expected_ms: float | None


class Plan(msgspec.Struct, frozen=True):
    """Everything a plan says; a figure that nothing tells is None."""

    model: str
    parameters: int
    profile: str
    mode: str
    use: Use
    fits: bool | None
    memory: Memory
    stages: tuple[Stage, ...]
    frame_to_hints: Latency | None
    first_token: Latency | None  # of the answer to a short question about a frame
    tokens_s_at_most: float | None  # with the context full
    tokens_s_expected: float | None


def choose_mode(profile: Profile, name: str | None) -> Mode:
    """The power mode of that name, or the fastest (None); raises SonoEdgeError listing the profile's modes."""
    for mode in profile.modes:
        if name is None or mode.name == name:
            return mode
    known = ", ".join(mode.name for mode in profile.modes)
    raise SonoEdgeError(f"{profile.id} has no mode {name!r}: choose {known}")


def make_plan(model: Model, profile: Profile, mode: Mode) -> Plan:
    """Plan a model for a device in a power mode."""
    use = model.use
    memory = plan_memory(model.shape, model.weights, use, profile)
    stages = tuple(_stages(model, profile, mode))
    by_name = {stage.name: stage for stage in stages}
    decode = by_name["decode"].time
    return Plan(
        model=model.name,
        parameters=model.shape.parameters,
        profile=profile.id,
        mode=mode.name,
        use=use,
        fits=memory.fits,
        memory=memory,
        stages=stages,
        frame_to_hints=_latency(by_name, ("vision", "prefill", "hints")),
        first_token=_latency(by_name, ("vision", "question")),
        tokens_s_at_most=None if decode.at_least_ms is None else 1e3 / decode.at_least_ms,
        tokens_s_expected=None if decode.expected_ms is None else 1e3 / decode.expected_ms,
    )


def _stages(model: Model, profile: Profile, mode: Mode) -> list[Stage]:
    shape, use, buckets, efficiency = model.shape, model.use, profile.buckets, profile.efficiency
    stages: list[Stage] = []
    if shape.vision is not None:
        tokens = bucket(use.image_tokens, None if buckets is None else buckets.image_tokens)
        patches = tokens * shape.vision.merge**2
        work = vision_work(shape, model.weights, patches, int8=use.int8_products)
        time = stage_time(work, mode, of_bandwidth=efficiency.decode, of_int8_rate=efficiency.vision)
        stages.append(Stage("vision", use.image_tokens, tokens, time))

    def decoder(name: StageName, tokens: int, before: int, logits_rows: int) -> None:
        one = name == "decode"
        rows = 1 if one else bucket(tokens, None if buckets is None else buckets.prefill_tokens)
        seen = bucket(before + tokens, None if buckets is None else buckets.context_tokens)
        work = decoder_work(
            shape,
            model.weights,
            rows=rows,
            seen=seen,
            logits_rows=logits_rows,
            cache_bits=cache_bits(use, profile),
            int8=use.int8_products and not one,
        )
        time = stage_time(work, mode, of_bandwidth=efficiency.decode, of_int8_rate=efficiency.prefill)
        stages.append(Stage(name, tokens, rows, time))

    if use.prefix_tokens is not None:
        decoder("prefill", use.prefix_tokens, 0, 1)
        if use.hint_tokens is not None and use.hint_rows is not None:
            decoder("hints", use.hint_tokens, use.prefix_tokens, use.hint_rows)
        if use.question_tokens is not None:
            decoder("question", use.prefix_tokens + use.question_tokens, 0, 1)
    decoder("decode", 1, use.context - 1, 1)
    return stages


def _latency(stages: dict[StageName, Stage], names: tuple[StageName, ...]) -> Latency | None:
    if any(name not in stages for name in names):
        return None
    times = [stages[name].time for name in names]
    return Latency(_sum([time.at_least_ms for time in times]), _sum([time.expected_ms for time in times]))


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None
