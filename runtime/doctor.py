"""`sonoedge doctor`: what this machine can do for SonoEdge, what it lacks, and what each line means."""

import os
import platform
import re
from pathlib import Path

import msgspec
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from sonoedge.runtime.gpu_findings import Finding, gpu_findings
from sonoedge.runtime.system_files import memory_bytes, read_system_file

_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "asimddp", "i8mm")  # instructions that multiply INT8 at full speed
_VIDEO_LIBRARIES = ("FFMPEG", "GStreamer", "v4l/v4l2")


def run(*, as_json: bool) -> None:
    """Look at this machine and print what was found."""
    findings = [_python(), _processor(), _memory(), _onnxruntime(), _opencv(), *gpu_findings()]
    if as_json:
        print(msgspec.json.encode({"findings": findings}).decode())
        return
    console = Console(highlight=False)
    for finding in findings:
        mark = "[green]✓[/]" if finding.ok else "[yellow]–[/]"
        console.print(f"{mark} [bold]{finding.name}[/]: ", end="")
        console.print(finding.value, markup=False)
        console.print(Padding(Text(finding.meaning), (0, 0, 0, 2)))


def _python() -> Finding:
    return Finding("Python", platform.python_version(), True, "3.10 or newer serves and builds.")


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0))
    flags = set(re.findall(r"\w+", read_system_file(Path("/proc/cpuinfo"))))
    fast = [flag for flag in _INT8_FLAGS if flag in flags]
    meaning = (
        f"INT8 runs at full speed ({', '.join(fast)})."
        if fast
        else "No INT8 dot-product instructions: INT8 works, slower than on a processor that has them."
    )
    return Finding("Processor", f"{platform.machine()}, {cores} cores usable", bool(fast), meaning)


def _memory() -> Finding:
    total, available = memory_bytes("MemTotal"), memory_bytes("MemAvailable")
    if total is None or available is None:
        return Finding("Memory", "unknown", False, "/proc/meminfo tells nothing: compare the bundle's size by hand.")
    meaning = "The weights of a bundle and its KV cache must fit what is available."
    return Finding("Memory", f"{available / 2**30:.1f} of {total / 2**30:.1f} GiB available", True, meaning)


def _onnxruntime() -> Finding:
    try:
        import onnxruntime
    except ImportError as error:
        way_out = "pip install 'sonoedge[cpu]', or 'sonoedge[gpu]' on an x86-64 host with an NVIDIA GPU."
        return Finding(
            "ONNX Runtime", f"not usable ({error})", False, f"Bundles cannot be served on the CPU: {way_out}"
        )
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    meaning = "Its graphs in a bundle can be served."
    if "CUDA" in providers:
        meaning += " `--backend cuda` needs CUDA's and cuDNN's libraries as well, and says so where they are missing."
    return Finding("ONNX Runtime", f"{onnxruntime.__version__} ({providers})", True, meaning)


def _opencv() -> Finding:
    import cv2

    built = dict(re.findall(r"^\s*(FFMPEG|GStreamer|v4l/v4l2):\s+(YES|NO)", cv2.getBuildInformation(), re.MULTILINE))
    missing = [name for name in _VIDEO_LIBRARIES if built.get(name) != "YES"]
    has = ", ".join(f"{name} {'no' if name in missing else 'yes'}" for name in _VIDEO_LIBRARIES)
    if missing == ["GStreamer"]:
        meaning = (
            "Videos, RTSP and cameras can be read. GStreamer pipelines need the system's own OpenCV (python3-opencv)."
        )
    elif missing:
        meaning = "Without FFMPEG no videos or RTSP, without v4l/v4l2 no cameras; DICOM clips and images still work."
    else:
        meaning = "Videos, RTSP, cameras and GStreamer pipelines can be read."
    return Finding("OpenCV", f"{cv2.__version__} ({has})", missing in ([], ["GStreamer"]), meaning)
