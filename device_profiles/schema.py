"""What a device profile says, and the rule that every number in it names its source or is said to be unknown."""

from itertools import pairwise
from typing import Annotated, Literal

import msgspec

from sonoedge.errors import SonoEdgeError

Unknown = Literal["unknown"]
Count = Annotated[int, msgspec.Meta(gt=0, le=2**53)]  # whole in every reader of the JSON
Amount = Annotated[float, msgspec.Meta(gt=0, le=1e9)]  # TOML can say inf, a device cannot
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
Counts = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
Precision = Literal["float32", "float16", "bfloat16", "int8", "int4", "fp8", "fp4"]

FIRST_SM: dict[Precision, int] = {"fp8": 89, "fp4": 100}  # first compute capability whose tensor cores have it


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
    system_bytes: Count | Unknown  # kept by the operating system and, where memory is shared, the GPU's driver
    shared_with_gpu: bool


class Mode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One power mode and what the device can do in it; arithmetic is dense, without structured sparsity."""

    name: str
    watts: Amount | Unknown
    bandwidth_gb_s: Amount | Unknown
    int8_dense_tops: Amount | Unknown
    fp16_dense_tflops: Amount | Unknown


class Software(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One release of the system software, and what engines made for it may use."""

    name: str  # "JetPack", or what brings CUDA and the builder together elsewhere
    version: str
    cuda: str
    builder: Literal["tensorrt", "tensorrt_rtx"]
    builder_version: str
    ptx_version: Count  # newest PTX that its driver accepts, without the point: 85 is 8.5
    ahead_of_time_plugins: bool


class Buckets(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The static sizes that engines are made for by default, ascending; a request takes the first that holds it."""

    image_tokens: Counts  # of one image, after merging
    prefill_tokens: Counts  # new tokens in one pass
    context_tokens: Counts  # tokens that attention reads, the new ones included

    def __post_init__(self) -> None:
        """Raise ValueError naming the first list that does not ascend, or a pass that no context holds."""
        for name in self.__struct_fields__:
            counts: tuple[int, ...] = getattr(self, name)
            if any(later <= earlier for earlier, later in pairwise(counts)):
                raise ValueError(f"{name} = {list(counts)} must ascend")
        if self.prefill_tokens[-1] > self.context_tokens[-1]:
            raise ValueError(
                f"prefill_tokens = {self.prefill_tokens[-1]} is more than the largest of context_tokens, "
                f"{self.context_tokens[-1]}"
            )


class Efficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a whole stage reaches of the device's limits."""

    decode: Share | Unknown  # of the memory bandwidth, one token at a time
    prefill: Share | Unknown  # of the dense INT8 rate
    vision: Share | Unknown  # of the dense INT8 rate


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device: what bundles are built for, what plans and fractions of a limit are reckoned from."""

    id: Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9.-]*$")]
    name: str
    device_class: Literal["orin", "thor", "rtx", "cpu"]
    backend: Literal["onnxruntime", "tensorrt"]
    cpu: Cpu
    gpu: Gpu | None = None
    memory: Memory
    modes: Annotated[tuple[Mode, ...], msgspec.Meta(min_length=1)]  # the fastest first: plans are made for it
    precisions: Annotated[tuple[Precision, ...], msgspec.Meta(min_length=1)]  # that the backend has on this device
    software: tuple[Software, ...] = ()  # the newest first: it is the target
    buckets: Buckets | None = None  # None: shapes are dynamic
    efficiency: Efficiency
    sources: dict[str, str]  # "cpu" or "cpu.cores" → where the numbers under that key come from


def check_agreement(profile: Profile) -> None:
    """Raise SonoEdgeError naming the first key that is missing for the backend, or that another key rules out."""
    whole, kept = profile.memory.capacity_bytes, profile.memory.system_bytes
    if isinstance(whole, int) and isinstance(kept, int) and kept >= whole:
        raise SonoEdgeError(
            f"memory.system_bytes = {kept} leaves nothing of memory.capacity_bytes = {whole}: correct one of them"
        )
    for precision in profile.precisions:
        if profile.gpu is not None and profile.gpu.sm < FIRST_SM.get(precision, 0):
            raise SonoEdgeError(
                f"precisions names {precision!r}, which gpu.sm = {profile.gpu.sm} does not have: remove it, or correct "
                f"gpu.sm ({precision} starts at {FIRST_SM[precision]})"
            )
    for index, software in enumerate(profile.software):
        if software.builder == "tensorrt_rtx" and software.ahead_of_time_plugins:
            raise SonoEdgeError(
                f"software[{index}].ahead_of_time_plugins = true, and tensorrt_rtx takes no plugins: set it to false"
            )
    if profile.backend == "tensorrt":
        for key, given in (("gpu", profile.gpu), ("software", profile.software), ("buckets", profile.buckets)):
            if not given:
                raise SonoEdgeError(
                    f'{key} is missing, and backend = "tensorrt" builds engines of fixed sizes for one GPU and one '
                    f'release: add it, or set backend = "onnxruntime"'
                )


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
