"""What Linux tells of a machine in files of its own."""

import re
from pathlib import Path
from typing import Literal

MEMORY_FILE = Path("/proc/meminfo")


def read_system_file(path: Path) -> str:
    """Return the text of a file of the system, empty where the system has no such file."""
    return path.read_text(errors="replace") if path.exists() else ""


def memory_bytes(key: Literal["MemTotal", "MemAvailable"]) -> int | None:
    """Return all memory, or what programs can have without swapping; None where the system does not tell."""
    found = re.search(rf"^{key}:\s+(\d+) kB", read_system_file(MEMORY_FILE), re.MULTILINE)
    return int(found[1]) * 1024 if found else None
