"""Peak memory of a command: children count, pages shared by forks count once, file pages do not count."""

import sys
from pathlib import Path

import pytest

MEGABYTE = 2**20
HOLD = "held = bytearray(b'x') * (100 << 20)"
WAIT = "import time; time.sleep(0.7)"


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux' /proc")
@pytest.mark.parametrize(
    ("lines", "megabytes"),
    [
        ((HOLD, WAIT), 100),
        ((HOLD, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD + chr(10) + WAIT!r}])"), 200),
        ((HOLD, "import os; os.fork()", WAIT), 100),
        (("import mmap; file = open('large'); held = mmap.mmap(file.fileno(), 0, prot=1); held[::4096]", WAIT), 0),
    ],
    ids=["one process", "a child beside it", "a fork", "a mapped file"],
)
def test_anonymous_memory_of_a_whole_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...], megabytes: int
) -> None:
    from benchmarks.memory import run_measured

    monkeypatch.chdir(tmp_path)
    Path("large").write_bytes(bytes(100 * MEGABYTE))
    peak = run_measured([sys.executable, "-W", "ignore", "-c", "\n".join(lines)]).peak_anonymous_bytes / MEGABYTE
    assert megabytes <= peak < megabytes + 30  # an interpreter takes some 5 MB itself


def test_the_last_line_and_the_time(capfd: pytest.CaptureFixture[str]) -> None:
    from benchmarks.memory import run_measured

    measured = run_measured([sys.executable, "-c", "import time; print('a'); time.sleep(0.3); print('b')"])
    assert measured.last_line == "b"
    assert 0.3 <= measured.seconds < 30
    assert capfd.readouterr() == ("", "a\nb\n")


def test_a_failure_is_told_with_what_was_said() -> None:
    from benchmarks.memory import CommandFailedError, run_measured

    with pytest.raises(CommandFailedError, match=r"(?s)ended with status 3: .*\ntoo bad"):
        run_measured([sys.executable, "-c", "print('x'); print('too bad'); raise SystemExit(3)"])


def test_a_process_that_is_gone_takes_nothing() -> None:
    from benchmarks.memory import anonymous_bytes

    assert anonymous_bytes(2**22 - 1) == 0
