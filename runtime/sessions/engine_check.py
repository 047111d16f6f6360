"""What is checked of a set of engines before one byte of it is loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sonoedge.bundle import Bundle
from sonoedge.engine_manifest import ENGINES_FILE, Engine, EngineSet, engines_folder, read_engines
from sonoedge.errors import SonoEdgeError
from sonoedge.manifest import ENGINES_FOLDER, check_name
from sonoedge.runtime.sessions.gpu import Gpu

_CHUNK_BYTES = 2**20


def again(bundle: Bundle, profile: str) -> str:
    """The way out of engines that do not fit: how they are made again."""
    named = "" if profile == bundle.manifest.profile else f" --profile {profile}"
    return f"run `sonoedge engine {bundle.root}{named}` again"


def read_sets(bundle: Bundle) -> dict[str, EngineSet]:
    """Every set of engines of a bundle by profile; raises SonoEdgeError when there is none."""
    folder = bundle.root / ENGINES_FOLDER
    # A build that was cut off leaves a folder whose name begins with a dot.
    profiles = sorted(path.parent.name for path in folder.glob(f"[!.]*/{ENGINES_FILE}"))
    if not profiles:
        raise SonoEdgeError(
            f"{bundle.root} has no engines: run `sonoedge engine {bundle.root}` on the device, or serve it with "
            "`--backend cpu`"
        )
    return {profile: read_engines(engines_folder(bundle.root, profile)) for profile in profiles}


def choose_set(bundle: Bundle, sets: dict[str, EngineSet], gpu: Gpu) -> str:
    """The profile whose engines are for this GPU, the bundle's own before others; raises SonoEdgeError without one."""
    own = bundle.manifest.profile
    fitting = [profile for profile, engines in sets.items() if engines.sm == gpu.sm]
    if own in fitting:
        return own
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise SonoEdgeError(
            f"{bundle.root} has engines of {' and '.join(fitting)} for this GPU, and the bundle was built for {own}: "
            f"remove all but one from {ENGINES_FOLDER}/"
        )
    made = ", ".join(f"{profile} (SM {engines.sm})" for profile, engines in sets.items())
    raise SonoEdgeError(
        f"{bundle.root} has engines for {made} and this GPU, {gpu.name}, is SM {gpu.sm}: "
        f"run `sonoedge engine {bundle.root}` with this device's --profile"
    )


def check_set(bundle: Bundle, profile: str, engines: EngineSet, gpu: Gpu, version: str) -> None:
    """Raise SonoEdgeError naming what a set of engines was made for and what is here instead.

    version: of the TensorRT that would load them. Engines that were made without a driver fit every driver.
    """
    where, way_out = f"{ENGINES_FOLDER}/{profile}", again(bundle, profile)
    made_for = {
        "model": (engines.model, bundle.manifest.model.id),
        "SM": (engines.sm, gpu.sm),
        engines.builder: (engines.builder_version, version),
        "driver": (engines.driver or gpu.driver, gpu.driver),
    }
    for what, (made, here) in made_for.items():
        if made != here:
            raise SonoEdgeError(f"{where} was made for {what} {made} and this is {what} {here}: {way_out}")
    for engine in engines.engines:
        if not engine.buckets:
            raise SonoEdgeError(f"{where}/{engine.path} lists no buckets: {way_out}")
    for stage in ("vision", "decoder"):
        if not any(engine.stage == stage for engine in engines.engines):
            raise SonoEdgeError(f"{where} has no {stage} engine: {way_out}")
    for engine in engines.engines:
        _check_plan(engines_folder(bundle.root, profile), engine, way_out)


def _check_plan(folder: Path, engine: Engine, way_out: str) -> None:
    """Refuse a plan file that is missing or is not the one that was written."""
    check_name(engine.path)
    path = folder / engine.path
    if not path.is_file():
        raise SonoEdgeError(f"{path} is missing: {way_out}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != engine.sha256:
        raise SonoEdgeError(f"{path} has changed since it was made (SHA-256 differs): {way_out}")
