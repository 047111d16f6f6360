"""Telling systemd how the service is: datagrams to NOTIFY_SOCKET, and a watchdog that is fed by progress alone.

Protocol: sd_notify(3) and sd_watchdog_enabled(3).
"""

import logging
import os
import socket
import time
from collections.abc import Mapping

LOG = logging.getLogger(__name__)


class Notifier:
    """Sends state to the supervisor that NOTIFY_SOCKET names; without one, every call does nothing."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID from `environment`."""
        path = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket: socket.socket | None = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)  # a supervisor that does not read must not hold up the scanner
        self.watchdog_s = _watchdog_s(environment)  # None: nobody waits for a sign of life
        self._beats: tuple[int, ...] | None = None  # when the watchdog was last fed
        self._due_s = 0.0
        self._status: str | None = None
        self._unread = False  # the last message did not go out, which the log has been told

    def ready(self, status: str) -> None:
        """Say that the service serves."""
        self._status = status
        self._send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """Say in one line what the service is doing, when that has changed."""
        if status != self._status:
            self._status = status
            self._send(f"STATUS={_line(status)}")

    def progress(self, beats: tuple[int, ...]) -> None:
        """Feed the watchdog at half its interval, but only when all of `beats` have moved since it was last fed."""
        now_s = time.monotonic()
        if self.watchdog_s is None or now_s < self._due_s:
            return
        if self._beats is not None and any(new == old for new, old in zip(beats, self._beats, strict=True)):
            return
        self._beats = beats
        self._due_s = now_s + self.watchdog_s / 2
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the service drains and ends."""
        self._send("STOPPING=1\nSTATUS=draining")

    def close(self) -> None:
        """Close the socket; later calls do nothing."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, message: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:  # its supervisor is its own affair: the scanner goes on
            if not self._unread:
                LOG.warning("the supervisor does not read what it is told: %s", error.strerror)
            self._unread = True
        else:
            self._unread = False


def _watchdog_s(environment: Mapping[str, str]) -> float | None:
    """Seconds after which the supervisor gives the process up; None when it does not watch this one."""
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = environment.get("WATCHDOG_USEC", "")
    return int(microseconds) / 1e6 if microseconds.isdecimal() and int(microseconds) else None


def _line(text: str) -> str:
    return " ".join(text.split())
