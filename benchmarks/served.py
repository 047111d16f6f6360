"""A `sonoedge serve` in a process of its own, for the measurements that talk to one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pydicom.data

CLIP = Path(
    str(pydicom.data.get_testdata_file("examples_ybr_color.dcm", download=False))
)  # 30 frames, inside the wheel
LOOPBACK = "tcp://127.0.0.1:*"
DRAIN_S = 20.0


class _Ready(msgspec.Struct, frozen=True):
    bind: str
    hints_bind: str
    model: str


class Served:
    """A running server: where it answers and publishes, and what it said at its end."""

    def __init__(self, process: subprocess.Popen[str], ready: _Ready) -> None:
        self._process = process
        self.pid = process.pid
        self.bind, self.hints_bind, self.model = ready.bind, ready.hints_bind, ready.model
        self.summary = ""  # its last line, once it has ended

    def stop(self) -> None:
        """Drain it with SIGTERM."""
        self._process.terminate()
        self.summary = self._process.communicate(timeout=DRAIN_S)[0].strip().rpartition("\n")[2]

    def exit_status(self) -> int:
        """Its status once it has ended."""
        return self._process.wait(DRAIN_S)


@contextlib.contextmanager
def served(bundle: Path, source: str, *, fps: float, python: Path = Path(sys.executable)) -> Iterator[Served]:
    """Serve `bundle` on free loopback ports until the block ends; raises CalledProcessError when it does not start."""
    code = "import sys; from sonoedge.cli import main; sys.exit(main())"
    verb = ["serve", str(bundle), "--source", source, "--fps", str(fps), "--bind", LOOPBACK, "--hints-bind", LOOPBACK]
    command = [str(python), "-c", code, *verb, "--allow-untrusted", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            server = Served(process, msgspec.json.decode(line, type=_Ready))
        except msgspec.DecodeError:
            raise subprocess.CalledProcessError(process.wait(), command, line) from None
        try:
            yield server
            server.stop()
        finally:
            if process.poll() is None:
                process.kill()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
