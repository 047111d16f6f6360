"""Builds all engines of a bundle for a profile: what can be refused is refused first, then built, checked and kept."""

import time
from pathlib import Path

import msgspec

from sonoedge.bundle import Bundle
from sonoedge.engine_manifest import Engine, EngineSet, Golden, engines_folder
from sonoedge.export.engines.builder import Built, Target, build_engine
from sonoedge.export.engines.device import Device
from sonoedge.export.engines.golden import check_engines
from sonoedge.export.engines.here import Here, look_here, readable_ptx
from sonoedge.export.engines.library import Library, find_library
from sonoedge.export.engines.room import check_room, estimate
from sonoedge.export.engines.stages import Plan, Stage, plan_stages
from sonoedge.export.engines.timing import TIMING_CACHE
from sonoedge.export.engines.write_set import SetWriter
from sonoedge.export.plugins.artifact import read_index
from sonoedge.progress import track


class Made(msgspec.Struct, frozen=True):
    """What was built, and what is worth telling of it."""

    library: Library
    plan: Plan
    engines: EngineSet
    built: tuple[Built, ...]  # in the order of the set
    lack: str  # why the golden check did not run; empty where it did
    folder: Path
    seconds: float


def make_set(bundle: Bundle, device: Device) -> Made:
    """Build, check and keep the engines; raises SonoEdgeError before any work for whatever can be known before."""
    began = time.monotonic()
    library = find_library(device)
    plan = plan_stages(bundle, device.buckets, library.abilities())
    here = look_here(device, library)
    if plan.experts == "plugins":
        _register(bundle, library, here, device.sm)
    check_room(bundle, estimate(bundle, plan, streamed=library.streams))
    with SetWriter(bundle.root, device.id) as writer:
        target = Target(library, device.sm, writer.folder / TIMING_CACHE)
        built = [build_engine(target, stage.graph, writer.folder / stage.plan, stage.extents) for stage in plan.stages]
        engines = _describe(bundle, device, library, plan, here, built)
        if here.gpu is not None:
            with track("golden check", None):
                error = check_engines(bundle, writer.folder, engines, library)
            engines = msgspec.structs.replace(engines, golden=Golden("passed", error))
        writer.commit(engines)
    folder = engines_folder(bundle.root, device.id)
    return Made(library, plan, engines, tuple(built), here.lack, folder, round(time.monotonic() - began, 1))


def _register(bundle: Bundle, library: Library, here: Here, sm: int) -> None:
    """Give the library the kernels that the bundle carries; refused when none is for this GPU and driver."""
    from sonoedge.export.plugins.registration import register_plugins

    assert bundle.manifest.kernels is not None  # plugins were planned
    assert here.gpu is not None  # a library with plugins builds on a GPU only
    folder, ptx_version = bundle.path(bundle.manifest.kernels).parent, readable_ptx(library, here.gpu)
    read_index(folder).check_target(sm, ptx_version)
    register_plugins(folder, sm, ptx_version)


def _describe(
    bundle: Bundle, device: Device, library: Library, plan: Plan, here: Here, built: list[Built]
) -> EngineSet:
    kernels = bundle.manifest.kernels
    return EngineSet(
        profile=device.id,
        sm=device.sm,
        builder=library.name,
        builder_version=library.version,
        driver=None if here.gpu is None else here.gpu.driver,
        model=bundle.manifest.model.id,
        experts=plan.experts,
        kernels=bundle.manifest.files[kernels].sha256 if kernels and plan.experts == "plugins" else None,
        engines=tuple(_engine(stage, made) for stage, made in zip(plan.stages, built, strict=True)),
        golden=Golden("not run"),
    )


def _engine(stage: Stage, built: Built) -> Engine:
    return Engine(
        stage=stage.name,
        path=stage.plan,
        sha256=built.sha256,
        bytes=built.bytes,
        buckets=stage.buckets,
        cache_in_place=stage.cache_in_place,
        workspace_bytes=built.workspace_bytes,
    )
