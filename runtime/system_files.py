"""What Linux tells of a machine in files of its own."""

import os
import re
from pathlib import Path
from typing import Literal

MEMORY_FILE = Path("/proc/meminfo")
RESIDENT_FILE = Path("/proc/self/statm")  # proc(5): pages, of which the second number is resident


def read_system_file(path: Path) -> str:
    """Return the text of a file of the system, empty where the system has no such file."""
    return path.read_text(errors="replace") if path.exists() else ""


def memory_bytes(key: Literal["MemTotal", "MemAvailable"]) -> int | None:
    """Return all memory, or what programs can have without swapping; None where the system does not tell."""
    found = re.search(rf"^{key}:\s+(\d+) kB", read_system_file(MEMORY_FILE), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def resident_bytes() -> int | None:
    """Return this process's resident memory, shared libraries included; None where the system does not tell."""
    pages = read_system_file(RESIDENT_FILE).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else None
