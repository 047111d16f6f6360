"""A supervisor as small as can be, after systemd's Type=notify, WatchdogSec= and Restart=on-failure.

supervisor.py WATCHDOG_S COMMAND...: one JSON line an event on standard output. What the command says on its own
standard output passes through; SIGTERM to the supervisor drains the command and ends with its status.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time


def say(event: str, **fields: object) -> None:
    print(json.dumps({"event": event, "at_s": time.monotonic(), **fields}), flush=True)


def main(watchdog_s: float, command: list[str]) -> int:
    stopping = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        path = f"{folder}/notify"
        inbox.bind(path)
        inbox.settimeout(0.02)
        while True:
            environment = os.environ | {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": str(round(watchdog_s * 1e6))}
            process = subprocess.Popen(command, env=environment)
            say("started", pid=process.pid)
            asked, alive_s = False, None
            while process.poll() is None:
                if stopping and not asked:
                    process.terminate()
                    asked = True
                with contextlib.suppress(TimeoutError):
                    for line in inbox.recv(4096).decode().splitlines():
                        if line == "READY=1":
                            say("ready", pid=process.pid)
                        if line in ("READY=1", "WATCHDOG=1"):
                            alive_s = time.monotonic()
                        if line.startswith(("STATUS=", "STOPPING=")):
                            say("said", line=line)
                if alive_s is not None and not asked and time.monotonic() > alive_s + watchdog_s:
                    say("watchdog", pid=process.pid)
                    process.kill()
                    process.wait()
            say("exited", pid=process.pid, status=process.returncode)
            if stopping or process.returncode == 0:
                return process.returncode
            time.sleep(0.1)  # RestartSec=100ms


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
