"""Every kernel that a model's experts need on a device, compiled on any host: each operator with each of its tiles."""

import hashlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from sonoedge.device_profiles import Profile
from sonoedge.device_profiles.schema import Buckets
from sonoedge.export.plugins.artifact import INDEX_FILE, Artifact, KernelIndex, Parameter, encode_index
from sonoedge.export.plugins.compile import Source
from sonoedge.export.plugins.dispatch import (
    DECODE,
    PREFILL,
    Activation,
    Experts,
    Kernel,
    Tile,
    default_block_rows,
    tiles,
)
from sonoedge.export.plugins.kernel_cache import build, cache_folder
from sonoedge.manifest import ExpertsSpec
from sonoedge.progress import track

ACTIVATION: Activation = "float32"  # what the graphs carry between int8 products
DECODE_TOKENS = (1,)  # one answer at a time
_TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "i8", "int32": "i32"}


class Target(msgspec.Struct, frozen=True, order=True):
    """What kernels are compiled for."""

    sm: int
    ptx_version: int  # without the point: 85 is 8.5


class KernelChoice(msgspec.Struct, frozen=True):
    """One operator computed in one way."""

    kernel: Kernel
    experts: Experts
    tile: Tile
    activation: Activation

    @property
    def name(self) -> str:
        """Unique among the kernels of a bundle for one target."""
        tokens = self.tile.constants.get("block_tokens")
        return f"{self.kernel.function}-{self.tile.name}" + (f"-t{tokens}" if tokens else "")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The kernel's parameters in order, in Triton's spelling."""

        def pointer(name: str, dtype: str) -> Parameter:
            return Parameter(name, f"*{_TRITON_TYPES[self.activation if dtype == 'A' else dtype]}")

        inputs = (pointer(buffer.name, buffer.dtype) for buffer in self.kernel.inputs)
        outputs = (pointer(buffer.name, buffer.dtype) for buffer in self.kernel.outputs)
        return (*inputs, Parameter("tokens", "i32"), *outputs)

    def source(self) -> Source:
        """Return the kernel with its types and constants; imports Triton."""
        module = importlib.import_module(f"sonoedge.export.plugins.{self.kernel.module}")
        return Source(
            getattr(module, self.kernel.function),
            {parameter.name: parameter.type for parameter in self.parameters},
            self.kernel.values(self.experts, self.tile),
            self.tile.num_warps,
            self.tile.num_stages,
        )


def targets(profile: Profile, *, plugins_only: bool) -> list[Target]:
    """Return what a device's kernels are compiled for: each PTX version of its software, the newest first.

    With `plugins_only`, software whose TensorRT takes no kernels compiled ahead of time is left out.
    """
    if profile.gpu is None:
        return []
    versions = {
        software.ptx_version for software in profile.software if software.ahead_of_time_plugins or not plugins_only
    }
    return [Target(profile.gpu.sm, version) for version in sorted(versions, reverse=True)]


def experts_for(spec: ExpertsSpec, prefill_tokens: int) -> Experts:
    """Return what the nodes of a model's experts say, blocks as tall as suits the largest number of prefill tokens."""
    block_rows = default_block_rows(prefill_tokens, spec.experts, spec.chosen)
    return Experts(**msgspec.structs.asdict(spec), block_rows=block_rows)


def prefill_counts(buckets: Buckets) -> tuple[int, ...]:
    """Return the numbers of tokens that a graph for many runs: its own sizes, and one where it serves that as well."""
    return (1, *buckets.prefill_tokens)


def choices(
    experts: Experts, activation: Activation, prefill_tokens: tuple[int, ...], decode_tokens: tuple[int, ...]
) -> list[KernelChoice]:
    """Return each kernel that passes over these numbers of tokens may take, once.

    Raises SonoEdgeError for sizes that the kernels cannot compute.
    """
    found: dict[str, KernelChoice] = {}
    for kernels, counts in ((PREFILL, prefill_tokens), (DECODE, decode_tokens)):
        for tokens in counts:
            experts.check(tokens)
            for kernel in kernels:
                for tile in tiles(kernel.operator, experts, tokens):
                    choice = KernelChoice(kernel, experts, tile, activation)
                    found.setdefault(choice.name, choice)
    return list(found.values())


def compile_all(wanted: list[KernelChoice], target: Target, folder: Path) -> Iterator[tuple[Artifact, str]]:
    """Yield each kernel with its PTX, from the cache in `folder` or compiled."""
    for choice in wanted:
        built = build(choice.source(), target.sm, target.ptx_version, folder)
        ptx = built.compiled.ptx
        artifact = Artifact(
            name=choice.name,
            operator=choice.kernel.operator,
            constants=choice.kernel.values(choice.experts, choice.tile),
            entry=built.compiled.entry,
            sm=target.sm,
            ptx=target.ptx_version,
            num_warps=choice.tile.num_warps,
            num_stages=choice.tile.num_stages,
            shared_memory_bytes=built.compiled.shared_memory_bytes,
            registers=built.usage.registers,
            spills=built.usage.spills,
            parameters=choice.parameters,
            file=f"{choice.name}.sm{target.sm}.ptx{target.ptx_version}.ptx",
            sha256=hashlib.sha256(ptx.encode()).hexdigest(),
        )
        yield artifact, ptx


def compile_for_targets(
    wanted: list[KernelChoice], wanted_targets: list[Target], label: str
) -> list[tuple[Artifact, str]]:
    """Return each kernel with its PTX for each target, from the user's cache or compiled; shows progress."""
    made = []
    with track(label, len(wanted) * len(wanted_targets)) as advance:
        for target in wanted_targets:
            for artifact, ptx in compile_all(wanted, target, cache_folder()):
                made.append((artifact, ptx))
                advance(note=artifact.name)
    return made


def write_kernels(
    path: Callable[[str], Path],
    experts: Experts,
    activation: Activation,
    prefill_tokens: tuple[int, ...],
    wanted_targets: list[Target],
) -> None:
    """Compile all kernels for the targets and write them and their index, each to where `path` says for its name."""
    wanted = choices(experts, activation, prefill_tokens, DECODE_TOKENS)
    made = compile_for_targets(wanted, wanted_targets, "compiling kernels")
    for artifact, ptx in made:
        path(artifact.file).write_text(ptx)
    index = KernelIndex(activation=activation, experts=experts, artifacts=tuple(artifact for artifact, _ in made))
    path(INDEX_FILE).write_bytes(encode_index(index))
