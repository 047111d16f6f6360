"""The folders are where they should be, and every module in them can be imported."""

import importlib
from pathlib import Path

import pytest

import sonoedge

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "sonoedge"
PARTS = ("calibration", "device_profiles", "export", "runtime")
LONGEST_MODULE_LINES = 400  # beyond that, a module is two ideas


def _modules() -> list[str]:
    files = [*PACKAGE.glob("*.py"), *(path for part in PARTS for path in (PACKAGE / part).rglob("*.py"))]
    names = (path.relative_to(PACKAGE.parent).with_suffix("").parts for path in files)
    return sorted(".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in names)


@pytest.mark.parametrize("part", PARTS)
def test_the_package_links_to_the_top_level_folders(part: str) -> None:
    link = PACKAGE / part
    assert link.is_symlink()
    assert str(link.readlink()) == f"../../{part}"
    assert (ROOT / part / "__init__.py").is_file()


def test_there_is_something_in_every_part() -> None:
    for part in PARTS:
        assert sum(name.startswith(f"sonoedge.{part}.") for name in _modules()) > 0


@pytest.mark.parametrize("name", _modules())
def test_every_module_can_be_imported(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    assert module.__file__
    assert len(Path(module.__file__).read_text().splitlines()) <= LONGEST_MODULE_LINES


def test_the_version_is_in_one_place() -> None:
    assert sonoedge.__version__ not in (ROOT / "pyproject.toml").read_text()
