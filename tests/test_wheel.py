"""What is installed is what is in the folders: links become code, data files come along, no checkout is needed."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("calibration", "device_profiles", "export", "runtime")
DATA = {".css", ".html", ".js", ".json", ".md", ".py", ".safetensors", ".svg", ".toml"}
LIST_PROFILES = """
import sonoedge, sonoedge.cli

print(sonoedge.__file__, flush=True)
sonoedge.cli.main(["profiles", "--json"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the checkout stays clean."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    for name in ("src", *PARTS):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    command = "pip wheel --quiet --no-deps --no-index --no-build-isolation --disable-pip-version-check --wheel-dir"
    subprocess.run([sys.executable, "-m", *command.split(), str(out), str(copy)], check=True)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    package = ROOT / "src" / "sonoedge"
    expected = {path.relative_to(package.parent).as_posix() for path in package.glob("*.py")}
    for part in PARTS:
        files = (path for path in (ROOT / part).rglob("*") if path.suffix in DATA)
        expected |= {f"sonoedge/{path.relative_to(ROOT).as_posix()}" for path in files}
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    ran = subprocess.run(
        [sys.executable, "-c", LIST_PROFILES],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    imported_from, profiles = ran.stdout.splitlines()
    assert imported_from == str(tmp_path / "installed" / "sonoedge" / "__init__.py")
    assert len(json.loads(profiles)["profiles"]) == len(list((ROOT / "device_profiles").glob("*.toml")))
