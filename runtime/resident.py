"""How much memory this process holds now."""

import os
from pathlib import Path

_STATM = Path("/proc/self/statm")  # proc(5): pages, of which the second number is resident
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int | None:
    """Return the resident memory, shared libraries included; None where there is no /proc."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return None
