"""The section [student] of a recipe: which sizes the student has, or what it must be small enough for."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Language = Literal["en", "zh"]


class StudentShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sizes of the student; one that is not named stays as in the teacher or, with a target, is picked for it.

    Targets: `parameters`, or a device `profile` that the student must fit, in `memory_bytes` while it serves and with
    `latency_ms` from a frame to its hints in the power `mode` (None: the fastest). Experts and vocabulary stay whole
    unless they are named. importance: "measured" chooses by the activations of calibration's frames, "weights" by
    sizes of weights, and layers evenly spread.
    """

    vision_layers: Count | None = None
    vision_mlp_size: Count | None = None
    layers: Count | None = None
    intermediate_size: Count | None = None
    expert_size: Count | None = None
    shared_expert_size: Count | None = None
    hidden_size: Count | None = None
    heads: Count | None = None
    kv_heads: Count | None = None
    experts: Count | None = None
    expert_method: Literal["drop", "merge"] = "drop"  # "merge": those that stay take over what the others gave
    languages: tuple[Language, ...] = ()  # whose tokens stay, beside every byte; none named: all tokens
    vocabulary: Count | None = None  # at most so many tokens, the most frequent ones
    importance: Literal["weights", "measured"] = "weights"
    parameters: Count | None = None
    profile: str | None = None
    mode: str | None = None
    latency_ms: Positive | None = None
    memory_bytes: Count | None = None

    def __post_init__(self) -> None:
        if self.parameters is not None and self.profile is not None:
            raise ValueError("give one of the keys `parameters` and `profile`")
        if self.profile is None and any(key is not None for key in (self.mode, self.latency_ms, self.memory_bytes)):
            raise ValueError("`mode`, `latency_ms` and `memory_bytes` are of a device: name it with the key `profile`")
        if self.vocabulary is not None and not self.languages:
            raise ValueError("`vocabulary` cuts the tokens of languages: name them with the key `languages`")
        if self.experts is not None and self.importance != "measured":
            raise ValueError('`experts` stay by measured routing: set importance = "measured"')
        if self.expert_method == "merge" and self.experts is None:
            raise ValueError('expert_method = "merge" needs the key `experts`, how many stay')

    @property
    def has_target(self) -> bool:
        """Whether sizes that are not named are picked."""
        return self.parameters is not None or self.profile is not None
