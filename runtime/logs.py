"""The log of the process: standard error, one line an event, which systemd's journal can sort by severity.

Nothing that came with a picture or a question goes there: neither text of a patient nor the name of a file.
"""

import logging
import os
import sys
from typing import Literal

LogLevel = Literal["debug", "info", "warning", "error"]

_SEVERITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


class _OneLine(logging.Formatter):
    """One line a record, its traceback included; `severity` puts sd-daemon(3)'s prefix before it."""

    def __init__(self, *, severity: bool) -> None:
        # The journal has a clock of its own.
        super().__init__("%(message)s" if severity else "%(asctime)s %(levelname)s %(message)s")
        self._severity = severity

    def format(self, record: logging.LogRecord) -> str:
        line = " | ".join(part.strip() for part in super().format(record).splitlines() if part.strip())
        return f"<{_SEVERITIES.get(record.levelno, 6)}>{line}" if self._severity else line


def log_to_stderr(level: LogLevel) -> None:
    """Send the log of `sonoedge` from `level` up to standard error; a second call replaces the first."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(severity=_is_journal()))
    logger = logging.getLogger("sonoedge")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def _is_journal() -> bool:
    """Whether standard error is the journal, as systemd.exec(5) says to find out."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
