"""What `sonoedge engine --dry-run` finds out on any host: what the kernels take, and which engines there would be."""

import msgspec

from sonoedge.bundle import Bundle
from sonoedge.device_profiles import Profile
from sonoedge.engine_manifest import Bucket, Builder
from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.device import device_of
from sonoedge.export.engines.library import promised_abilities
from sonoedge.export.engines.room import estimate
from sonoedge.export.engines.stages import Experts, plan_stages
from sonoedge.export.plugins.artifact import Artifact, read_index
from sonoedge.export.plugins.report import KernelRow, compile_for, rows


class PlannedEngine(msgspec.Struct, frozen=True):
    """One engine that would be built."""

    stage: str
    graph: str  # inside the bundle
    buckets: tuple[Bucket, ...]


class DryRun(msgspec.Struct, frozen=True):
    """What a build for the newest software of a device would do and need."""

    kernels: list[KernelRow]
    profile: str
    sm: int
    builder: Builder
    builder_version: str
    experts: Experts
    engines: list[PlannedEngine]
    memory_bytes: int
    disk_bytes: int


def dry_run(bundle: Bundle, profile: Profile) -> DryRun:
    """Compile the kernels and plan the engines; builds none, and needs neither GPU nor TensorRT."""
    device = device_of(profile)
    software = device.software[0]
    plan = plan_stages(bundle, device.buckets, promised_abilities(software))
    need = estimate(bundle, plan, streamed=True)
    return DryRun(
        kernels=rows(_kernels(bundle, profile, device.sm)),
        profile=device.id,
        sm=device.sm,
        builder=software.builder,
        builder_version=software.builder_version,
        experts=plan.experts,
        engines=[
            PlannedEngine(stage.name, stage.graph.relative_to(bundle.root).as_posix(), stage.buckets)
            for stage in plan.stages
        ],
        memory_bytes=need.memory_bytes,
        disk_bytes=need.disk_bytes,
    )


def _kernels(bundle: Bundle, profile: Profile, sm: int) -> list[Artifact]:
    """Those of the bundle for this GPU, else compiled here."""
    manifest = bundle.manifest
    if manifest.kernels is not None:
        index = read_index(bundle.path(manifest.kernels).parent)
        carried = [artifact for artifact in index.artifacts if artifact.sm == sm]
        if carried:
            return carried
    try:
        return compile_for(manifest.experts, profile)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise SonoEdgeError(
            f"the bundle has no kernels for sm_{sm} and triton, which compiles them, is not installed: "
            "pip install 'sonoedge[export]', or build the bundle for this profile, which puts them into it"
        ) from error
