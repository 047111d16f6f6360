"""`sonoedge inspect`: what a checkpoint is and which devices can hold it, read from its headers alone."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from sonoedge.device_profiles import list_profiles
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import open_checkpoint
from sonoedge.export.models.shards import TensorHeader

SCALE_BYTES = 4  # INT8 matrices keep one float32 scale an output row, vectors stay float32


class Fit(msgspec.Struct, frozen=True):
    """Whether the INT8 weights alone go into a device's memory; `plan` also counts caches and the system's share."""

    profile: str
    capacity_bytes: int | None  # None: differs from host to host
    fits: bool | None


class Inspection(msgspec.Struct, frozen=True):
    """What `inspect` reports; `active_parameters` leaves out the experts that a token does not choose."""

    architecture: str
    parameters: int
    active_parameters: int
    vision_parameters: int
    layers: int
    hidden_size: int
    experts: int  # 0 for a dense model
    experts_per_token: int
    vocabulary: int
    context_tokens: int
    tied_embeddings: bool
    dtype: str  # as in safetensors, several joined by +
    weight_bytes: int
    int8_bytes: int
    files: int
    profiles: tuple[Fit, ...]


def run(checkpoint: Path, as_json: bool) -> int:
    """Print what `checkpoint` is; SonoEdgeError when it is not a whole EchoVLM or Qwen2-VL checkpoint."""
    inspection = inspect_checkpoint(checkpoint)
    if as_json:
        print(msgspec.json.encode(inspection).decode())
    else:
        _print_tables(checkpoint, inspection)
    return 0


def inspect_checkpoint(checkpoint: Path) -> Inspection:
    """Read config.json and the headers of the weights; no weight is loaded."""
    config, headers = open_checkpoint(checkpoint)
    parameters = sum(header.parameters for header in headers.values())
    int8_bytes = sum(map(_int8_bytes, headers.values()))
    return Inspection(
        architecture=config.architecture,
        parameters=parameters,
        active_parameters=parameters - _idle_parameters(config),
        vision_parameters=sum(header.parameters for key, header in headers.items() if key.startswith("visual.")),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        experts=0 if config.moe is None else config.moe.num_experts,
        experts_per_token=0 if config.moe is None else config.moe.num_experts_per_tok,
        vocabulary=config.vocab_size,
        context_tokens=config.max_position_embeddings,
        tied_embeddings=config.tie_word_embeddings,
        dtype="+".join(sorted({header.dtype for header in headers.values()})),
        weight_bytes=sum(header.bytes for header in headers.values()),
        int8_bytes=int8_bytes,
        files=len({header.file for header in headers.values()}),
        profiles=tuple(_fits(int8_bytes)),
    )


def _fits(int8_bytes: int) -> Iterator[Fit]:
    for profile in list_profiles():
        capacity = profile.memory.capacity_bytes
        if capacity == "unknown":
            yield Fit(profile.id, None, None)
        else:
            yield Fit(profile.id, capacity, int8_bytes <= capacity)


def _idle_parameters(config: ModelConfig) -> int:
    if config.moe is None:
        return 0
    expert = 3 * config.hidden_size * config.moe.moe_intermediate_size
    return config.num_hidden_layers * (config.moe.num_experts - config.moe.num_experts_per_tok) * expert


def _int8_bytes(header: TensorHeader) -> int:
    if len(header.shape) < 2:
        return header.parameters * SCALE_BYTES
    return header.parameters + header.shape[0] * SCALE_BYTES


def _print_tables(checkpoint: Path, inspection: Inspection) -> None:
    table = Table(title=str(checkpoint), box=SIMPLE, show_header=False)
    rows = {
        "architecture": inspection.architecture,
        "parameters": f"{_count(inspection.parameters)} ({_count(inspection.vision_parameters)} of them vision)",
        "active a token": _count(inspection.active_parameters),
        "decoder": f"{inspection.layers} layers of width {inspection.hidden_size}",
        "experts": f"{inspection.experts}, {inspection.experts_per_token} a token"
        if inspection.experts
        else "none (dense)",
        "vocabulary": f"{inspection.vocabulary}{', tied embeddings' if inspection.tied_embeddings else ''}",
        "context": f"{inspection.context_tokens} tokens",
        "weights": f"{inspection.dtype}, {_size(inspection.weight_bytes)} in {inspection.files} file(s)",
        "weights at INT8": _size(inspection.int8_bytes),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    devices = Table(title="INT8 weights against device memory", box=SIMPLE)
    for heading in ("profile", "memory", "fits"):
        devices.add_column(heading)
    for fit in inspection.profiles:
        if fit.capacity_bytes is None:
            devices.add_row(fit.profile, "differs", "depends on the host")
        else:
            devices.add_row(fit.profile, _size(fit.capacity_bytes), "yes" if fit.fits else "no")
    console = Console()
    console.print(table)
    console.print(devices)


def _count(number: int) -> str:
    return _scaled(number, ("", " k", " M", " G"))


def _size(number: int) -> str:
    return _scaled(number, (" B", " kB", " MB", " GB"))


def _scaled(number: float, units: tuple[str, ...]) -> str:
    power = 0
    while number >= 1000 and power < len(units) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.4g}{units[power]}"
