"""`sonoedge plan`: whether a model fits a device and how fast it will be there, before anything is built."""

from __future__ import annotations

from pathlib import Path

import msgspec

from sonoedge.bundle import MANIFEST_FILE
from sonoedge.device_profiles import load_profile
from sonoedge.device_profiles.advice import Advice, advise
from sonoedge.device_profiles.planning import Model, Plan, choose_mode, make_plan
from sonoedge.device_profiles.schema import Profile
from sonoedge.export.plan_source import bundle_model, checkpoint_model
from sonoedge.export.plan_tables import print_report, size
from sonoedge.export.recipe import load_recipe

WHOLE_BYTES_A_PARAMETER = 9  # the float32 model and two forms of its int8 graphs, as `build` reckons
# One block in float32; with what a build holds beside it 2.2 GB at the released sizes (docs/decisions.md, Full size).
BLOCK_BYTES_A_PARAMETER, BUILD_BASE_BYTES = 4, 800_000_000


class HostBuild(msgspec.Struct, frozen=True):
    """Memory that `sonoedge build` takes on the host: with the model whole, or one block at a time."""

    whole_bytes: int
    block_bytes: int


class Report(msgspec.Struct, frozen=True):
    """What the verb tells."""

    verdict: str
    fits: bool | None
    serving_bytes: int
    building_bytes: int  # on the device
    plan: Plan
    host_build: HostBuild | None  # None for a bundle, which is built
    advice: Advice | None  # None where it fits, or nothing tells


def run(model: Path, profile: str, recipe: str | None, mode: str | None, *, as_json: bool) -> int:
    """Print the plan of a checkpoint or bundle for a device profile; 1 when it does not fit."""
    device = load_profile(profile)
    chosen = choose_mode(device, mode)
    built = (model / MANIFEST_FILE).exists()
    source = bundle_model(model, device) if built else checkpoint_model(model, load_recipe(recipe), device)
    plan = make_plan(source, device, chosen)
    report = Report(
        verdict=_verdict(plan, device),
        fits=plan.fits,
        serving_bytes=plan.memory.serving_bytes,
        building_bytes=plan.memory.building_bytes,
        plan=plan,
        host_build=None if built else _host_build(source),
        advice=advise(source, device) if plan.fits is False else None,
    )
    if as_json:
        print(msgspec.json.encode(report).decode())
    else:
        host = report.host_build
        host_build = None if host is None else (host.whole_bytes, host.block_bytes)
        print_report(plan, device, report.verdict, report.advice, host_build)
    return 1 if plan.fits is False else 0


def _host_build(model: Model) -> HostBuild:
    shape = model.shape
    block = (shape.parameters - msgspec.structs.replace(shape, layers=0).parameters) // shape.layers
    return HostBuild(
        whole_bytes=WHOLE_BYTES_A_PARAMETER * shape.parameters + BUILD_BASE_BYTES,
        block_bytes=BLOCK_BYTES_A_PARAMETER * block + BUILD_BASE_BYTES,
    )


def _verdict(plan: Plan, device: Profile) -> str:
    memory = plan.memory
    building = f", building its engines {size(memory.building_bytes)}" if memory.building else ""
    needs = f"serving takes {size(memory.serving_bytes)}{building}"
    if memory.capacity_bytes is None:
        return f"Whether it fits cannot be told, since the memory of {device.id} is unknown: {needs}."
    capacity = size(memory.capacity_bytes)
    if memory.system_bytes is None:
        if plan.fits:
            left = size(memory.capacity_bytes - memory.peak_bytes)
            return f"It fits {capacity} as long as everything else keeps no more than {left}: {needs}."
        return f"It does not fit {capacity}: {needs}."
    fits = "It fits" if plan.fits else "It does not fit"
    room = memory.capacity_bytes - memory.system_bytes
    return f"{fits}: {needs}, and the system leaves {size(room)} of {capacity}."
