"""The rows of `sonoedge engine BUNDLE --profile P --dry-run`: what each kernel of a device takes, compiled here."""

from collections.abc import Iterable

import msgspec

from sonoedge.device_profiles import Profile
from sonoedge.export.plugins.artifact import Artifact
from sonoedge.export.plugins.dispatch import Activation
from sonoedge.export.plugins.kernel_cache import cache_folder
from sonoedge.export.plugins.kernel_set import DECODE_TOKENS, choices, compile_all, experts_for, targets
from sonoedge.manifest import ExpertsSpec
from sonoedge.progress import track


class KernelRow(msgspec.Struct, frozen=True):
    """What one kernel takes."""

    name: str
    sm: int
    ptx: int  # PTX version without the point: 85 is 8.5
    registers: int  # of 32 bits, a thread
    spills: int  # bytes that a thread stores for want of registers, plus bytes that it loads again
    shared_memory_bytes: int  # a block


def compile_for(spec: ExpertsSpec | None, profile: Profile, activation: Activation = "float32") -> list[Artifact]:
    """Compile every kernel of a model's experts for every PTX version of a device's software.

    Nothing for a dense model or a device without a GPU. Raises SonoEdgeError for sizes that the kernels cannot compute.
    """
    wanted_targets = targets(profile, plugins_only=False)
    if spec is None or not wanted_targets or profile.buckets is None:
        return []
    prefill_tokens = profile.buckets.prefill_tokens
    experts = experts_for(spec, prefill_tokens[-1])
    # The graph for many tokens may serve one as well.
    wanted = choices(experts, activation, (1, *prefill_tokens), DECODE_TOKENS)
    made = []
    with track(f"compiling kernels for {profile.id}", len(wanted) * len(wanted_targets)) as advance:
        for target in wanted_targets:
            for artifact, _ in compile_all(wanted, target, cache_folder()):
                made.append(artifact)
                advance(note=artifact.name)
    return made


def rows(artifacts: Iterable[Artifact]) -> list[KernelRow]:
    """Return what is printed of compiled kernels."""
    return [KernelRow(a.name, a.sm, a.ptx, a.registers, a.spills, a.shared_memory_bytes) for a in artifacts]
