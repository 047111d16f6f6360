"""The rows of `sonoedge engine BUNDLE --profile P --dry-run`: what each kernel of a device takes, compiled here."""

from collections.abc import Iterable

import msgspec

from sonoedge.device_profiles import Profile
from sonoedge.export.plugins.artifact import Artifact
from sonoedge.export.plugins.kernel_set import (
    ACTIVATION,
    DECODE_TOKENS,
    choices,
    compile_for_targets,
    experts_for,
    prefill_counts,
    targets,
)
from sonoedge.manifest import ExpertsSpec


class KernelRow(msgspec.Struct, frozen=True):
    """What one kernel takes."""

    name: str
    sm: int
    ptx: int  # PTX version without the point: 85 is 8.5
    registers: int  # of 32 bits, a thread
    spills: int  # bytes that a thread stores for want of registers, plus bytes that it loads again
    shared_memory_bytes: int  # a block


def compile_for(spec: ExpertsSpec | None, profile: Profile) -> list[Artifact]:
    """Compile every kernel of a model's experts for every PTX version of a device's software.

    Nothing for a dense model or a device without a GPU. Raises SonoEdgeError for sizes that the kernels cannot compute.
    """
    wanted_targets = targets(profile, plugins_only=False)
    if spec is None or not wanted_targets or profile.buckets is None:
        return []
    experts = experts_for(spec, profile.buckets.prefill_tokens[-1])
    wanted = choices(experts, ACTIVATION, prefill_counts(profile.buckets), DECODE_TOKENS)
    made = compile_for_targets(wanted, wanted_targets, f"compiling kernels for {profile.id}")
    return [artifact for artifact, _ in made]


def rows(artifacts: Iterable[Artifact]) -> list[KernelRow]:
    """Return what is printed of compiled kernels."""
    return [KernelRow(a.name, a.sm, a.ptx, a.registers, a.spills, a.shared_memory_bytes) for a in artifacts]
