"""Finds the library that builds a profile's engines, and says what it can do."""

import importlib
import re
from typing import Any

import msgspec

from sonoedge.device_profiles.schema import Software
from sonoedge.engine_manifest import GET_BUILDER, Builder
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.device import Device

NAMES: dict[Builder, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
LEAST_FOR_PLUGINS = (10, 9)  # TensorRT's first release that embeds kernels compiled ahead of time
LEAST_FOR_CACHE_UPDATE = (10, 15)  # TensorRT's first release that writes a KV cache in place


class Abilities(msgspec.Struct, frozen=True):
    """What engines of one builder may use."""

    plugins: bool  # kernels compiled ahead of time as operators of the graph
    cache_in_place: bool  # operators of opset 24, among them the one that writes the KV cache in place
    decode_rows: int  # of a pass for one token; rows beyond the first are padding


# For passes of one row TensorRT-RTX 1.7 keeps weights a second time, and unpacks weight-only ones in every pass.
DECODE_ROWS: dict[Builder, int] = {"tensorrt": 1, "tensorrt_rtx": 2}


class Library(msgspec.Struct, frozen=True):
    """A builder that is installed here, and the release of the profile's software that it belongs to."""

    name: Builder
    version: str
    software: Software
    module: Any

    def __str__(self) -> str:
        """Name and version as messages say them."""
        return f"{NAMES[self.name]} {self.version}"

    @property
    def needs_gpu(self) -> bool:
        """Whether engines can be built on a GPU of their own kind only."""
        return self.name == "tensorrt"

    @property
    def streams(self) -> bool:
        """Whether it writes a plan piece by piece instead of holding it whole."""
        return hasattr(self.module.Builder, "build_serialized_network_to_stream")

    def abilities(self) -> Abilities:
        """What the installed library can do."""
        return Abilities(
            plugins=promised_abilities(self.software).plugins and hasattr(self.module, "QuickPluginCreationRequest"),
            cache_in_place=hasattr(self.module, "IKVCacheUpdateLayer"),
            decode_rows=DECODE_ROWS[self.name],
        )


def promised_abilities(software: Software) -> Abilities:
    """What the builder that a profile names can do, going by its version."""
    full = software.builder == "tensorrt"
    version = _numbers(software.builder_version)
    return Abilities(
        plugins=full and software.ahead_of_time_plugins and version >= LEAST_FOR_PLUGINS,
        cache_in_place=not full or version >= LEAST_FOR_CACHE_UPDATE,
        decode_rows=DECODE_ROWS[software.builder],
    )


def find_library(device: Device) -> Library:
    """Import the builder of the newest of a device's software that is installed here.

    Raises SonoEdgeError when none is installed, when it cannot be loaded, is of another version than the profile names
    or does not build for the profile's GPU.
    """
    found: dict[Builder, Any] = {}
    for software in device.software:
        name = software.builder
        if name not in found:
            found[name] = _import(name)
        module = found[name]
        if module is not None and _numbers(module.__version__)[:2] == _numbers(software.builder_version)[:2]:
            library = Library(name, module.__version__, software, module)
            _check_target(device, library)
            return library
    installed = {name: module.__version__ for name, module in found.items() if module is not None}
    if not installed:
        ways = "; ".join(f"{name} is not installed: {GET_BUILDER[name]}" for name in found)
        raise SonoEdgeError(f"engines for {device.id} cannot be built here, {ways}")
    have = " and ".join(f"{NAMES[name]} {version}" for name, version in installed.items())
    wanted = " or ".join(f"{NAMES[s.builder]} {s.builder_version} ({s.name} {s.version})" for s in device.software)
    raise SonoEdgeError(
        f"{have} is installed and profile {device.id} names {wanted}: install that, or list this version under "
        "[[software]] in a TOML profile of your own"
    )


def _import(name: Builder) -> Any:
    """The library, None where it is not installed; raises SonoEdgeError where it is and cannot be loaded."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None
        raise SonoEdgeError(f"{name} lacks {error.name}: install it again, {GET_BUILDER[name]}") from error
    except (ImportError, OSError) as error:
        raise SonoEdgeError(
            f"{name} is installed and cannot be loaded ({error}): install it again, {GET_BUILDER[name]}"
        ) from error


def _check_target(device: Device, library: Library) -> None:
    """Refuse a GPU that TensorRT-RTX does not build for; TensorRT builds for the GPU that it runs on."""
    if library.needs_gpu:
        return
    names = library.module.ComputeCapability.__members__
    if f"SM{device.sm}" not in names:
        known = sorted(int(name[2:]) for name in names if name.startswith("SM"))
        raise SonoEdgeError(
            f"profile {device.id} has gpu.sm = {device.sm}, which {library} does not build for: it builds for "
            f"{', '.join(map(str, known))}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in leading.group().split(".")) if leading else ()
