"""The random checkpoint and the bundles that are measured, made once under build/bench/."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.environments import ROOT

FOLDER = ROOT / "build" / "bench"
RECIPES = ROOT / "benchmarks" / "recipes"
INT8_RECIPE, FLOAT_RECIPE = str(RECIPES / "int8.toml"), str(RECIPES / "float32.toml")
PROFILES = {"x86_64": "cpu-x86-64", "aarch64": "cpu-aarch64"}


def checkpoint(config: str) -> Path:
    """The random checkpoint of a packaged config, or of a config.json."""
    name = config if "/" not in config and not config.endswith(".json") else Path(config).resolve().parent.name
    path = FOLDER / name / "checkpoint"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _sonoedge("make-checkpoint", "--config", config, "--random", "--out", str(path))
    return path


def bundle(made: Path, recipe: str) -> Path:
    """The bundle of the checkpoint `made` by a packaged recipe, or by a TOML file, for this machine's processor."""
    path = made.parent / f"bundle-{Path(recipe).stem}"
    if not path.exists():
        profile = PROFILES[platform.machine()]
        _sonoedge(
            "build",
            str(made),
            "--profile",
            profile,
            "--recipe",
            recipe,
            "--calibration",
            "phantoms",
            "--out",
            str(path),
        )
    return path


def _sonoedge(*arguments: str) -> None:
    """Run one verb; its output goes to standard error, and a failure ends the bench."""
    code = "import sys; from sonoedge.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *arguments], stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise SystemExit(f"sonoedge {' '.join(arguments)} ended with status {done.returncode}")
