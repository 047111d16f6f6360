"""What a device profile says, and the rule that every number in it names its source or is said to be unknown."""

from typing import Annotated, Literal

import msgspec

from sonoedge.errors import SonoEdgeError

Unknown = Literal["unknown"]
Count = Annotated[int, msgspec.Meta(gt=0)]
Amount = Annotated[float, msgspec.Meta(gt=0)]


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The processor; graphs are laid out for its architecture."""

    architecture: Literal["x86-64", "aarch64"]
    model: str
    cores: Count | Unknown


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The GPU that kernels and engines are compiled for."""

    model: str
    sm: Count  # compute capability without the point: 87 is 8.7
    cuda_cores: Count
    tensor_cores: Count


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The memory that weights and caches must fit, the system's own share included."""

    capacity_bytes: Count | Unknown
    shared_with_gpu: bool


class Mode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One power mode and what the device can do in it; arithmetic is dense, without structured sparsity."""

    name: str
    watts: Amount | Unknown
    bandwidth_gb_s: Amount | Unknown
    int8_dense_tops: Amount | Unknown
    fp16_dense_tflops: Amount | Unknown


class JetPack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One release of the system software, and what engines made for it may use."""

    version: str
    cuda: str
    tensorrt: str
    ptx_version: Count  # newest PTX that its driver accepts, without the point: 85 is 8.5
    ahead_of_time_plugins: bool


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device: what bundles are built for, what plans and fractions of a limit are reckoned from."""

    id: Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9.-]*$")]
    name: str
    backend: Literal["onnxruntime", "tensorrt"]
    cpu: Cpu
    gpu: Gpu | None = None
    memory: Memory
    modes: Annotated[tuple[Mode, ...], msgspec.Meta(min_length=1)]  # the fastest first: plans are made for it
    jetpacks: tuple[JetPack, ...] = ()  # the newest first: it is the target
    sources: dict[str, str]  # "cpu" or "cpu.cores" → where the numbers under that key come from


def check_sources(profile: Profile) -> None:
    """Raise SonoEdgeError naming the first number without a source, or the first source of nothing."""
    numbers = _numbers(msgspec.to_builtins(profile), "")
    for key, value in numbers:
        if not any(_covers(source, key) for source in profile.sources):
            raise SonoEdgeError(
                f'{key} = {value} names no source: add a line "{key.partition(".")[0]}" = "…" to [sources]'
            )
    for source in profile.sources:
        if not any(_covers(source, key) for key, _ in numbers):
            raise SonoEdgeError(f"sources.{source} speaks of no number in the profile: remove it, or correct the key")


def _covers(source: str, key: str) -> bool:
    return key == source or key.startswith(f"{source}.")


def _numbers(value: object, key: str) -> list[tuple[str, object]]:
    """Every (dotted key, number or "unknown") in the profile; an item of a list counts as the list."""
    match value:
        case bool() | str() | None:
            return [(key, value)] if value == "unknown" else []
        case int() | float():
            return [(key, value)]
        case dict():
            return [found for name, item in value.items() for found in _numbers(item, f"{key}.{name}".lstrip("."))]
        case list() | tuple():
            return [found for item in value for found in _numbers(item, key)]
        case _:
            return []
