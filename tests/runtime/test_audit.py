"""The audit log goes on after whatever happened, stays within its size, and shows what was done to it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime import audit_check
from sonoedge.runtime.audit import SMALLEST_BYTES, AuditLog
from sonoedge.runtime.audit_check import verify

VALUES = st.text() | st.integers() | st.floats() | st.none() | st.booleans()


def write(
    folder: Path,
    count: int = 5,
    wall_ns: Callable[[], int] = time.time_ns,
    mono_ns: Callable[[], int] = time.monotonic_ns,
) -> None:
    with AuditLog(folder, SMALLEST_BYTES, wall_ns=wall_ns, mono_ns=mono_ns) as log:
        for number in range(count):
            log.record("hint", {"frame": number, "answer": "breast", "model": "0123"})


def records(folder: Path) -> list[dict[str, Any]]:
    return [msgspec.to_builtins(record) for record in audit_check._records(folder)]


def newest(folder: Path) -> Path:
    return sorted(folder.glob("*.jsonl"))[-1]


def until(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_what_was_said_can_be_read_again_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    write(tmp_path, 2)
    report = verify(tmp_path)
    assert (report.verified, report.records, report.first, report.last, report.notes) == (True, 9, 1, 9, [])
    assert [record["kind"] for record in records(tmp_path)] == ["begin", *["hint"] * 5, "begin", *["hint"] * 2]
    assert [record["fields"].get("frame") for record in records(tmp_path)[1:6]] == [0, 1, 2, 3, 4]
    audit_check.run_show(tmp_path, "hint", 1, as_json=True)
    assert msgspec.json.decode(capsys.readouterr().out)["fields"]["frame"] == 1
    audit_check.run_show(tmp_path, None, None, as_json=False)
    assert capsys.readouterr().out.count("\n") == 9
    assert audit_check.run_verify(tmp_path, report.head, as_json=False) == 0
    assert "9 records in 1 files, whole and unchanged; head 9:" in capsys.readouterr().out
    assert oct(newest(tmp_path).stat().st_mode & 0o777) == oct(0o600)


def _changed(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[3].replace(b"breast", b"kidney"), *lines[4:]]


TAMPERING: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "changed": _changed,
    "changed last": lambda lines: [*lines[:-1], lines[-1].replace(b"breast", b"kidney")],
    "removed": lambda lines: lines[:3] + lines[4:],
    "removed first": lambda lines: lines[1:],
    "removed last": lambda lines: lines[:-1],
    "removed all but one": lambda lines: lines[:1],
    "inserted": lambda lines: [*lines[:3], lines[3], *lines[3:]],
    "appended copy": lambda lines: [*lines, lines[-1]],
    "reordered": lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
    "no record": lambda lines: [*lines[:3], b"hello", *lines[3:]],
    "cut in the middle": lambda lines: [*lines[:3], lines[3][:20], *lines[4:]],
}


@pytest.mark.parametrize("how", TAMPERING)
@pytest.mark.parametrize("goes_on", [False, True], ids=["at rest", "then written on"])
def test_tampering_shows_even_after_the_log_went_on(tmp_path: Path, how: str, goes_on: bool) -> None:
    write(tmp_path, 6)
    assert verify(tmp_path).verified
    lines = newest(tmp_path).read_bytes().splitlines()
    newest(tmp_path).write_bytes(b"".join(line + b"\n" for line in TAMPERING[how](lines)))
    if goes_on:
        write(tmp_path, 3)
        assert records(tmp_path)[-1]["fields"]["frame"] == 2
    report = verify(tmp_path)
    assert not report.verified
    assert report.problems
    assert audit_check.run_verify(tmp_path, None, as_json=True) == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_shows(data: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "log"
    if not folder.exists():
        write(folder, 4)
        (tmp_path / "good").write_bytes(newest(folder).read_bytes())
    content = bytearray((tmp_path / "good").read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    newest(folder).write_bytes(content)
    assert not verify(folder).verified


def test_a_whole_chain_written_anew_is_told_by_a_head_noted_elsewhere(tmp_path: Path) -> None:
    write(tmp_path / "log", 6)
    noted = verify(tmp_path / "log").head
    shutil.rmtree(tmp_path / "log")
    write(tmp_path / "log", 20)
    assert verify(tmp_path / "log").verified
    assert audit_check.run_verify(tmp_path / "log", noted, as_json=False) == 1
    with pytest.raises(SonoEdgeError, match="is no head of a log"):
        audit_check.run_verify(tmp_path / "log", "12", as_json=False)


def test_rotation_keeps_within_the_bound_and_verifies_from_the_oldest_kept_record(tmp_path: Path) -> None:
    for _ in range(3):
        write(tmp_path, 400)
        assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) <= SMALLEST_BYTES
        report = verify(tmp_path)
        assert report.verified, report.problems
        assert report.first is not None
        assert report.first > 1
        assert any("dropped to keep the log within its size" in note for note in report.notes)
    assert report.last is not None
    assert report.last > 1200
    assert records(tmp_path)[-1]["fields"]["frame"] == 399
    sorted(tmp_path.glob("*.jsonl"))[0].unlink()
    assert "not because of the log's size" in verify(tmp_path).problems[0]


def test_a_file_removed_from_the_middle_shows(tmp_path: Path) -> None:
    write(tmp_path, 150)
    files = sorted(tmp_path.glob("*.jsonl"))
    assert len(files) >= 3
    files[1].unlink()
    assert "some are missing or moved" in verify(tmp_path).problems[0]


def test_a_process_killed_while_it_dropped_the_oldest_file_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "unlink", lambda *_args, **_kwargs: None)
    write(tmp_path, 400)
    assert verify(tmp_path).verified
    monkeypatch.undo()
    write(tmp_path, 400)
    assert verify(tmp_path).verified
    assert sum(path.stat().st_size for path in tmp_path.glob("*.jsonl")) <= SMALLEST_BYTES


WRITER = """
import sys, time
from pathlib import Path
from sonoedge.runtime.audit import AuditLog

log = AuditLog(Path(sys.argv[1]))
number = 0
while True:
    log.record("hint", {"frame": number})
    number += 1
    if log.state.written > 200:
        print("written", flush=True)
    time.sleep(0.0005)
"""


def test_a_killed_process_leaves_a_log_that_verifies_and_goes_on(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"written\n"
        with pytest.raises(SonoEdgeError, match="written by another process"):
            AuditLog(tmp_path)
        writer.send_signal(signal.SIGKILL)
    before = verify(tmp_path)
    assert before.verified
    assert before.records > 200
    write(tmp_path, 1)
    after = verify(tmp_path)
    assert after.verified
    assert after.records == before.records + 2


@pytest.mark.parametrize("left", [b'{"seq": 6, "wall', b"\0" * 500, b'{"seq":'], ids=["half", "zeros", "start"])
def test_a_half_line_is_told_and_writing_goes_on_in_a_new_file(tmp_path: Path, left: bytes) -> None:
    write(tmp_path, 4)
    with newest(tmp_path).open("ab") as file:
        file.write(left)
    damaged = newest(tmp_path)
    content = damaged.read_bytes()
    report = verify(tmp_path)
    assert report.verified
    where = f"000001.jsonl: {len(left)} bytes after byte {len(content) - len(left)} are no record"
    assert report.notes == [f"{where}: the process ended while it wrote"]
    write(tmp_path, 2)
    assert damaged.read_bytes() == content  # nothing that is there is ever changed
    assert [path.name for path in sorted(tmp_path.glob("*.jsonl"))] == ["000001.jsonl", "000002.jsonl"]
    report = verify(tmp_path)
    assert (report.verified, len(report.notes), report.last) == (True, 1, 8)
    damaged.write_bytes(content[:-1] + b"x")  # not what the process found
    assert not verify(tmp_path).verified


def test_a_file_of_nothing_but_zeros_after_a_power_cut_is_told_too(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (tmp_path / "000002.jsonl").write_bytes(b"\0" * 4096)
    write(tmp_path, 1)
    report = verify(tmp_path)
    assert (report.verified, report.files, report.records) == (True, 3, 7)


def test_a_clock_that_is_set_is_recorded(tmp_path: Path) -> None:
    wall = [1_800_000_000 * 10**9]

    def set_clock() -> int:
        return wall[0]

    def steady_clock() -> int:
        return 5 * 10**9

    with AuditLog(tmp_path, wall_ns=set_clock, mono_ns=steady_clock) as log:
        log.record("hint", {"frame": 0})
        wall[0] -= 3600 * 10**9
        log.record("hint", {"frame": 1})
        wall[0] += 500 * 10**6  # not worth a word
        log.record("hint", {"frame": 2})
        wall[0] += 7200 * 10**9
        log.record("hint", {"frame": 3})
    wall[0] -= 86400 * 10**9
    write(tmp_path, 1, wall_ns=set_clock, mono_ns=steady_clock)
    kinds = [(record["kind"], record["fields"].get("moved_ms")) for record in records(tmp_path)]
    assert kinds[:7] == [
        ("begin", None),
        ("hint", None),
        ("clock", -3_600_000.0),
        ("hint", None),
        ("hint", None),
        ("clock", 7_200_000.0),
        ("hint", None),
    ]
    assert records(tmp_path)[7]["fields"]["clock_back_ms"] == 86_400_000.0
    report = verify(tmp_path)
    assert (report.verified, report.last) == (True, 9)


FULL = """
import os, sys, time
from pathlib import Path
from sonoedge.runtime.audit import AuditLog
from sonoedge.runtime.audit_check import verify

folder = Path(sys.argv[1])
log = AuditLog(folder / "log")
log.record("hint", {"frame": 0})
while log.state.written < 2:
    time.sleep(0.01)
ballast = (folder / "ballast").open("wb", buffering=0)
try:
    while ballast.write(b"x" * 512):
        pass
except OSError:
    pass
slowest = 0.0
for number in range(12_000):
    began = time.perf_counter()
    log.record("hint", {"frame": number, "text": "x" * 100})
    slowest = max(slowest, time.perf_counter() - began)
until = time.monotonic() + 10
while log.state.state != "disk full" and time.monotonic() < until:
    time.sleep(0.01)
state = log.state
assert state.state == "disk full", state
assert "free space" in state.detail, state
assert state.lost > 0, state
assert slowest < 0.5, slowest
assert verify(folder / "log").verified
(folder / "ballast").unlink()
ballast.close()
until = time.monotonic() + 10
while (log.state.state != "writing" or log.state.waiting) and time.monotonic() < until:
    time.sleep(0.01)
log.record("after", {})
lost = log.state.lost
log.close()
report = verify(folder / "log")
assert report.verified, report
last = [record for record in __import__("sonoedge.runtime.audit_check", fromlist=["x"])._records(folder / "log")]
assert last[-1].kind in ("after", "lost"), last[-1]
assert sum(record.fields["records"] for record in last if record.kind == "lost") == lost
assert sum(record.kind == "hint" for record in last) == 12_001 - lost
print("fine")
"""


def test_a_full_disk_is_told_never_waits_and_heals(tmp_path: Path) -> None:
    mount = f'mount -t tmpfs -o size=4m tmpfs "{tmp_path}" && exec "$@"'
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount, "-", "true"], check=False).returncode:
        pytest.skip("needs a mount namespace of its own (Debian package: util-linux, and a kernel that allows it)")
    command = [unshare, "-rm", "sh", "-c", mount, "-", sys.executable, "-W", "error", "-c", FULL, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, "fine\n"), ran.stderr


def test_a_half_written_line_is_taken_back_when_the_disk_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = os.fdopen
    refuse = [0]

    class Filling:
        """A file that takes half a line and no more, while told so."""

        def __init__(self, file: Any) -> None:
            self._file = file

        def write(self, data: bytes) -> int:
            if not refuse[0]:
                return int(self._file.write(data))
            return int(self._file.write(data[: len(data) // 2]))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(os, "fdopen", lambda *a, **k: Filling(real_open(*a, **k)))
    with AuditLog(tmp_path) as log:
        log.record("hint", {"frame": 0})
        assert until(lambda: log.state.written == 2)
        refuse[0] = 1
        log.record("hint", {"frame": 1})
        assert until(lambda: log.state.state == "disk full")
        assert newest(tmp_path).read_bytes().endswith(b"\n")
        refuse[0] = 0
        assert until(lambda: log.state.state == "writing" and log.state.written == 3)
    assert [record["fields"].get("frame") for record in records(tmp_path)] == [None, 0, 1]
    assert verify(tmp_path).verified


def test_what_cannot_be_recorded_says_so_and_costs_nothing_else(tmp_path: Path) -> None:
    with AuditLog(tmp_path, SMALLEST_BYTES) as log:
        log.record("ask", {"question": "\ud800"})
        log.record("ask", {"question": "q" * 100_000})
        log.record("ask", {"question": object()})
        log.record("ask", {"question": "肝脏?", "probability": float("nan"), "big": 2**70})
    fields = [record["fields"] for record in records(tmp_path)[1:]]
    assert ["unrecordable" in field for field in fields] == [True, True, True, False]
    assert fields[3]["question"] == "肝脏?"
    assert verify(tmp_path).verified


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(said=st.lists(st.dictionaries(st.text(), VALUES), max_size=8))
def test_whatever_is_recorded_verifies(tmp_path: Path, said: list[dict[str, Any]]) -> None:
    with AuditLog(tmp_path) as log:
        for fields in said:
            log.record("any", fields)
    assert verify(tmp_path).verified
    assert log.state.written == 1 + len(said)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="holds no audit log"):
        verify(tmp_path)
    with pytest.raises(SonoEdgeError, match="allow at least 65536"):
        AuditLog(tmp_path, 10)
    (tmp_path / "file").write_text("")
    with pytest.raises(SonoEdgeError, match="cannot hold an audit log"):
        AuditLog(tmp_path / "file")


def test_a_log_is_let_go_when_closed(tmp_path: Path) -> None:
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        write(tmp_path, 1)
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
