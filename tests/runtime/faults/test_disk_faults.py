"""The disk of the audit log fills up: hints and answers go on, it is told, and the chain goes on when there is room."""

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sonoedge.runtime.audit_chain import read_records, segments
from sonoedge.runtime.audit_check import verify
from sonoedge.runtime.client import Client

FAKE = Path(__file__).parent.with_name("serve_fake.py")
ROOM_KB = 400
SERVE = f"""
import runpy, sys
from pathlib import Path
from unittest import mock
from sonoedge.runtime import serve

load = runpy.run_path({str(FAKE)!r})["load"]
with mock.patch("sonoedge.runtime.serve.open_model", load):
    serve.run(Path("bundle"), sys.argv[2], None, None, None, None, True, config=Path(sys.argv[3]))
"""
SMALL_DISK = f'mount -t tmpfs -o size={ROOM_KB}k none "$0" && exec "$@"'  # seen by this process alone


def test_a_full_disk_stops_the_log_and_nothing_else(
    tokenizer_file: Path, clip: Path, tmp_path: Path, stopwatch: Callable[..., float]
) -> None:
    disk, config = tmp_path / "disk", tmp_path / "serve.toml"
    disk.mkdir()
    endpoints = 'bind = "tcp://127.0.0.1:*"\nhints_bind = "tcp://127.0.0.1:*"\n'
    config.write_text(f'{endpoints}log_level = "info"\naudit = "{disk}/audit"\n')
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run(
        [*unshare, "mount", "-t", "tmpfs", "none", str(disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("waits for a system where a process may have a disk of its own (unshare of Debian's util-linux)")
    serve = [sys.executable, "-c", SERVE, str(tokenizer_file), str(clip), str(config)]
    with subprocess.Popen(
        [*unshare, "sh", "-c", SMALL_DISK, str(disk), *serve],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        log: list[str] = []
        errors = process.stderr
        reader = threading.Thread(target=lambda: log.extend(errors))
        reader.start()
        try:
            ready = msgspec.json.decode(process.stdout.readline())
            seen = Path(f"/proc/{process.pid}/root{disk}")
            with Client(ready["bind"], timeout_s=30) as client:

                def told(words: str) -> bool:
                    """Whether the server has said so; every look gives the log something to write."""
                    assert client.answer("Is a lesion visible?").answer in ("yes", "no")
                    return any(f"audit log: {words}" in line for line in log)

                stopwatch(lambda: client.status().telemetry.hinted > 0, within_s=20)
                written = fill(seen / "other")
                full_s = stopwatch(lambda: told(f"{disk}/audit: No space left"), within_s=20)
                hinted = client.status().telemetry.hinted
                stopwatch(lambda: client.status().telemetry.hinted > hinted + 30, within_s=20)
                assert client.status().source.state == "live"
                (seen / "other").unlink()
                recovered_s = stopwatch(lambda: told("writing"), within_s=20)
            process.send_signal(signal.SIGSTOP)
            shutil.copytree(seen / "audit", tmp_path / "copy")
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(30)
        finally:
            process.kill()
            reader.join()
    assert process.returncode == 0
    report = verify(tmp_path / "copy")
    assert report.verified, report.problems
    print(f"{written} bytes filled it; told after {full_s:.2f} s, writing again after {recovered_s:.2f} s")
    assert recovered_s < 5
    kinds = [record.kind for path in segments(tmp_path / "copy") for _, record in read_records(path)]
    assert kinds.count("answer") > 1
    assert "lost" not in kinds  # what was said while there was no room waited for it


def fill(path: Path) -> int:
    """Take all the room there is and return how many bytes that was."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    return path.stat().st_size
