"""What the runtime takes on a scanner: disk by package, seconds until it serves, resident memory while it does.

python -m benchmarks.footprint [--bundle BUNDLE] [--starts 7] [--seconds 20]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np

from benchmarks.environments import ROOT
from benchmarks.served import CLIP, resident_bytes, served

SHOWN = 8  # packages, the largest first


class Footprint(msgspec.Struct, frozen=True):
    """The last line; sizes are of files, Python itself aside, with the bytecode that serving once leaves."""

    disk_bytes: int
    packages_bytes: Mapping[str, int]  # the largest; "others": the rest together
    demo_checkpoint_bytes: int  # part of the package sonoedge, and of no use on a scanner
    ready_s: float  # median from the start of the process to its ready line
    ready_worst_s: float
    resident_bytes: int


def install(folder: Path) -> Path:
    """Install what a scanner installs into an environment of its own and return its Python."""
    venv.create(folder, symlinks=True, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "--quiet", "--quiet"]
    checkout = folder / "checkout"  # a copy, so that building leaves nothing in the real one
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "demo_out", "node_modules", "__pycache__")
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=unwanted)
    what = ["--no-compile", "-c", str(ROOT / "constraints.txt"), f"{checkout}[cpu]"]
    subprocess.run([*pip, "install", *what], check=True, stdout=sys.stderr)
    return python


def sizes(python: Path) -> dict[str, int]:
    """Bytes of every entry of site-packages, metadata and libraries counted to their package; the largest first."""
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    found: dict[str, int] = {}
    for entry in site.iterdir():
        name = entry.name.partition("-")[0].partition(".")[0]
        size = sum(path.lstat().st_size for path in (entry, *entry.rglob("*")) if path.is_file())
        found[name] = found.get(name, 0) + size
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure(python: Path, bundle: Path, starts: int, seconds: float) -> tuple[list[float], int]:
    """Return how long every start took, the first of all aside, and the memory of the last after so many seconds."""
    took: list[float] = []
    resident = 0
    for number in range(starts + 1):
        began = time.monotonic()
        with served(bundle, str(CLIP), fps=30.0, python=python) as server:
            took.append(time.monotonic() - began)
            if number == starts:
                time.sleep(seconds)
                resident = resident_bytes(server.pid)
    return took[1:], resident


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("demo_out/bundle"))
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # else every start would compile everything anew
    with TemporaryDirectory(prefix="sonoedge-") as folder:
        python = install(Path(folder))
        took, resident = measure(python, options.bundle, options.starts, options.seconds)
        packages = sizes(python)
    checkpoint = sum(path.stat().st_size for path in (ROOT / "export" / "demo_checkpoint").rglob("*") if path.is_file())
    shown = dict(list(packages.items())[:SHOWN])
    shown["others"] = sum(packages.values()) - sum(shown.values())
    for name, size in shown.items():
        print(f"{size / 1e6:8.1f} MB  {name}", file=sys.stderr)
    result = Footprint(
        sum(packages.values()), shown, checkpoint, round(float(np.median(took)), 2), round(max(took), 2), resident
    )
    print(msgspec.json.encode(result).decode())
