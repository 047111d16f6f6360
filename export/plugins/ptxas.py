"""What a kernel takes of a multiprocessor, as NVIDIA's assembler reports it; the Triton wheel brings the assembler.

Source: NVIDIA, CUDA Compiler Driver (ptxas, --verbose).
"""

import re
import subprocess
import tempfile
from pathlib import Path

import msgspec

from sonoedge.errors import SonoEdgeError

# SMs from which Triton compiles for the exact chip: PTX with this suffix runs on no other.
_FIRST_EXACT_SM = 90
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_TOO_NEW = re.compile(r"Unsupported \.version \S+; current version is '([0-9.]+)'")
_VERSION = re.compile(r"^\.version \S+", re.MULTILINE)
_TIME_LIMIT_S = 300


class Usage(msgspec.Struct, frozen=True):
    """What one thread and one block of a kernel take."""

    registers: int  # of 32 bits, a thread
    spills: int  # bytes that a thread stores for want of registers, plus bytes that it loads again
    static_shared_bytes: int  # a block, beside what the launch asks for


def measure(ptx: str, sm: int) -> Usage:
    """Assemble PTX for an SM and return what the kernel takes; raises SonoEdgeError when the assembler refuses it.

    An older release of Triton brings an assembler that reads no PTX as new as a device's. Triton writes no instruction
    that needs it, so the same code is measured as the newest version that the assembler reads.
    """
    ran = _assemble(ptx, sm)
    if newest := _TOO_NEW.search(ran.stderr):
        ran = _assemble(_VERSION.sub(f".version {newest[1]}", ptx, count=1), sm)
    said = ran.stdout + ran.stderr
    spills, registers = _SPILLS.search(said), _REGISTERS.search(said)
    if ran.returncode or spills is None or registers is None:
        reason = " ".join(said.split()) or f"exit status {ran.returncode}"
        raise SonoEdgeError(f"ptxas refuses a kernel for sm_{sm} ({reason}): compile it for another SM or PTX version")
    shared = _SHARED.search(said)
    return Usage(int(registers[1]), int(spills[1]) + int(spills[2]), int(shared[1]) if shared else 0)


def _assemble(ptx: str, sm: int) -> subprocess.CompletedProcess[str]:
    gpu = f"sm_{sm}" + ("a" if sm >= _FIRST_EXACT_SM else "")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler(), "--verbose", f"--gpu-name={gpu}", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIME_LIMIT_S, check=False)


def assembler() -> str:
    """Return the path of the newest assembler of the Triton wheel: it knows every SM of the profiles."""
    from triton import knobs

    return str(knobs.nvidia.ptxas_blackwell.path)
