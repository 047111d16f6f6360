"""The disk of the audit log fills up: hints and answers go on, it is told, and the chain goes on when there is room."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

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
# A disk of its own, seen by this process alone, most of it taken by something else.
SMALL_DISK = f"""
mount -t tmpfs -o size={ROOM_KB}k none "$0" && head -c {ROOM_KB // 2 * 1024} /dev/zero > "$0/other" && exec "$@"
"""


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
        ready = msgspec.json.decode(process.stdout.readline())
        log: list[str] = []
        errors = process.stderr
        reader = threading.Thread(target=lambda: log.extend(errors))
        reader.start()
        with Client(ready["bind"], timeout_s=30) as client:
            full_s = stopwatch(
                lambda: any("audit log: " in line and "full" in line.lower() for line in log), within_s=30
            )
            hinted = client.status().telemetry.hinted
            assert client.answer("Is a lesion visible?").answer in ("yes", "no")
            stopwatch(lambda: client.status().telemetry.hinted > hinted + 30, within_s=10)
            assert client.status().source.state == "live"
            seen = Path(f"/proc/{process.pid}/root{disk}")
            (seen / "other").unlink()
            recovered_s = stopwatch(lambda: any("audit log: writing" in line for line in log), within_s=10)
        time.sleep(0.5)
        process.send_signal(signal.SIGSTOP)
        shutil.copytree(seen / "audit", tmp_path / "copy")
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(30)
        reader.join()
    assert process.returncode == 0
    report = verify(tmp_path / "copy")
    assert report.verified, report.problems
    print(
        f"full after {full_s:.1f} s, writing again {recovered_s:.2f} s after there was room, {report.records} records"
    )
    assert recovered_s < 5
    assert (tmp_path / "copy" / "000001.jsonl").stat().st_size > ROOM_KB // 2 * 1024  # went on behind what was there
