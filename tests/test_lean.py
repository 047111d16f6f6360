"""A scanner serves without the training half: the runtime neither imports nor needs torch, transformers or onnx."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parent.parent / "runtime"
HEAVY = ("accelerate", "onnx", "onnx_ir", "onnxscript", "optimum", "psutil", "safetensors", "torch", "transformers")
PARTS_OF_THE_OTHER_HALF = ("sonoedge.export", "sonoedge.calibration")

REPORT = f"""
import json, sys
print(json.dumps([name for name in {HEAVY + PARTS_OF_THE_OTHER_HALF!r} if name in sys.modules]))
"""


def _loaded_by(code: str, *arguments: str) -> list[str]:
    """Run code in a Python of its own and return which of the heavy modules it has loaded."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + REPORT, *arguments], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    loaded: list[str] = json.loads(ran.stdout.splitlines()[-1])
    return loaded


def _runtime_modules() -> list[str]:
    names = (path.relative_to(RUNTIME.parent).with_suffix("").parts for path in sorted(RUNTIME.rglob("*.py")))
    return [".".join(("sonoedge", *(part for part in parts if part != "__init__"))) for parts in names]


def test_importing_the_whole_runtime_loads_none_of_them() -> None:
    modules = _runtime_modules()
    assert "sonoedge.runtime.serve" in modules
    assert _loaded_by("\n".join(f"import {name}" for name in modules)) == []


def test_the_runtime_imports_where_none_of_them_is_installed() -> None:
    blocked = f"import sys\nfor name in {HEAVY!r}: sys.modules[name] = None\n"
    code = blocked + "\n".join(f"import {name}" for name in _runtime_modules())
    code += f"\nfor name in {HEAVY!r}: del sys.modules[name]\n"
    assert _loaded_by(code) == []


def test_playing_a_clip_loads_none_of_them() -> None:
    code = """
import pydicom.data
from sonoedge.runtime.preprocess import ImageSpec, crop_to_sector, preprocess
from sonoedge.runtime.sources import open_source

clip = pydicom.data.get_testdata_file("examples_ybr_color.dcm", download=False)
frames = [preprocess(crop_to_sector(frame), ImageSpec()) for frame in open_source(str(clip), once=True, fps=1000)]
assert len(frames) == 30
"""
    assert _loaded_by(code) == []


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["verify", "nothing"]])
def test_the_command_line_starts_with_little(arguments: list[str]) -> None:
    code = f"""
import sys
from sonoedge.cli import main

main({arguments!r})
assert not {{"numpy", "cv2", "zmq", "onnxruntime", "tokenizers"}} & set(sys.modules)
"""
    assert _loaded_by(code) == []
