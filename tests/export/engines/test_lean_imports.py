"""A device builds engines with TensorRT and NumPy: nothing of the build host is imported or needed."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[3] / "export" / "engines"
HEAVY = ("onnx", "onnx_ir", "onnxscript", "safetensors", "tensorrt", "tensorrt_rtx", "torch", "transformers", "triton")


def test_the_verb_imports_where_none_of_it_is_installed() -> None:
    names = [f"sonoedge.export.engines.{path.stem}" for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"]
    assert "sonoedge.export.engines.engine" in names
    code = f"import sys\nfor name in {(*HEAVY, 'cv2', 'zmq', 'cuda')!r}: sys.modules[name] = None\n"
    code += "\n".join(f"import {name}" for name in names)
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
