"""`sonoedge engine`: compile a bundle for a device, on the device, or where its builder needs none, on any host."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from sonoedge.bundle import open_bundle
from sonoedge.device_profiles import load_profile
from sonoedge.engine_manifest import Bucket
from sonoedge.export.engines.device import device_of
from sonoedge.export.engines.dry_run import DryRun, dry_run
from sonoedge.export.engines.library import NAMES
from sonoedge.export.engines.make_set import Made, make_set
from sonoedge.export.engines.stages import Experts

_EXPERTS: dict[Experts, str] = {
    "plugins": "plugins, with kernels compiled ahead of time",
    "functions": "the portable function of standard operators",
    "none": "none, the model is dense",
}


def run(bundle: Path, profile: str | None, dry: bool, *, as_json: bool) -> None:
    """Build the engines and check them, or say what would be built; `profile` is the bundle's own when None."""
    opened = open_bundle(bundle)
    chosen = load_profile(profile or opened.manifest.profile)
    if dry:
        planned = dry_run(opened, chosen)
        if as_json:
            print(msgspec.json.encode(planned).decode())
        else:
            _print_plan(planned)
        return
    made = make_set(opened, device_of(chosen))
    if as_json:
        print(msgspec.json.encode(_result(made)).decode())
    else:
        _print_made(made)


def _result(made: Made) -> dict[str, Any]:
    """The JSON line: what `engines.json` says, and what was seen on the way."""
    described: dict[str, Any] = msgspec.to_builtins(made.engines)
    for engine, built in zip(described["engines"], made.built, strict=True):
        engine |= {"layers": built.layers, "products": msgspec.to_builtins(built.products), "seconds": built.seconds}
    kernels, golden = described.pop("kernels"), made.engines.golden
    return described | {
        "golden": golden.state,
        "golden_error": golden.error,
        "kernels_sha256": kernels,
        "folder": str(made.folder),
        "seconds": made.seconds,
    }


def _print_made(made: Made) -> None:
    engines = made.engines
    print(f"{made.folder}: engines for {engines.profile} (sm_{engines.sm}), built by {made.library}")
    for engine, built in zip(engines.engines, made.built, strict=True):
        lost = (*built.products.not_int8, *built.products.unpacked)
        int8 = built.products.int8 + built.products.int8_weights
        print(
            f"  {engine.path}: {engine.bytes / 1e6:.1f} MB in {built.seconds:.1f} s, {built.layers} layers, "
            f"{int8} of {int8 + len(lost)} products in int8; {_sizes(engine.stage, engine.buckets)}"
        )
        if lost:
            print(f"    not in int8, although their weights are: {_some(lost)}")
    print(_experts(made))
    if engines.golden.state == "passed":
        print(f"golden check: passed, largest difference {engines.golden.error:.2g}")
    else:
        print(f"golden check: not run, since {made.lack}; `sonoedge serve` runs it at its first start")


def _experts(made: Made) -> str:
    """How routed experts run, and why so."""
    said = f"experts: {_EXPERTS[made.engines.experts]}"
    if made.engines.experts != "functions":
        return said
    if made.library.abilities().plugins:
        return f"{said}, since the bundle carries no kernels for plugins"
    return f"{said}, since {made.library} takes no kernels compiled ahead of time"


def _print_plan(plan: DryRun) -> None:
    print(f"{plan.profile} (sm_{plan.sm}), {NAMES[plan.builder]} {plan.builder_version}: nothing is built")
    if plan.kernels:
        table = Table("kernel", "PTX", "registers", "spilled bytes", "shared memory", box=None, pad_edge=False)
        for kernel in plan.kernels:
            table.add_row(
                kernel.name,
                f"{kernel.ptx / 10:.1f}",
                str(kernel.registers),
                str(kernel.spills),
                f"{kernel.shared_memory_bytes} B",
            )
        Console(highlight=False).print(table)
    for engine in plan.engines:
        print(f"{engine.stage} from {engine.graph}: {_sizes(engine.stage, engine.buckets)}")
    print(f"experts: {_EXPERTS[plan.experts]}")
    print(f"needs up to {plan.memory_bytes / 1e9:.1f} GB of memory and {plan.disk_bytes / 1e9:.1f} GB of disk")


def _sizes(stage: str, buckets: tuple[Bucket, ...]) -> str:
    """Buckets in a few words."""
    if stage == "vision":
        return f"pictures of up to {_list(bucket.rows for bucket in buckets)} patches"
    rows, seen = sorted({bucket.rows for bucket in buckets}), sorted({bucket.seen for bucket in buckets})
    return f"passes of up to {_list(rows)} tokens that read up to {_list(seen)}"


def _list(numbers: Iterable[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, …"
