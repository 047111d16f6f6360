"""What happens to the process: it is killed, it hangs, its clock is set back; under a supervisor like systemd."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.protocol import Answer, Hint, Status

Command = Callable[..., list[str]]
Supervise = Callable[..., Any]
Stopwatch = Callable[..., float]
AskStatus = Callable[[str], Status | None]

RECOVERED_WITHIN_S = 10.0  # start of Python and all, with other work on the processors


def test_killed_it_is_back_on_the_same_endpoints(
    supervise: Supervise, faulty: Command, clip: Path, tmp_path: Path, status: AskStatus, stopwatch: Stopwatch
) -> None:
    bind, hints_bind = f"ipc://{tmp_path}/ask", f"ipc://{tmp_path}/hints"
    served = supervise(faulty(clip, "--bind", bind, "--hints-bind", hints_bind))
    stopwatch(lambda: served.count("ready") == 1, within_s=20)
    first = served.pid()
    with Client(bind, timeout_s=30) as client:  # connected before and after, as a scanner's screen is
        assert client.answer("Is a lesion visible?").answer in ("yes", "no")
        os.kill(first, signal.SIGKILL)
        recovered_s = stopwatch(lambda: served.count("ready") == 2, within_s=RECOVERED_WITHIN_S)
        stopwatch(lambda: getattr(status(bind), "source", None) is not None, within_s=5)
        assert isinstance(client.answer("Is a lesion visible?"), Answer)
    assert served.pid() != first
    hint = next(message for message in listen(hints_bind, timeout_s=10) if isinstance(message, Hint))
    assert hint.age_ms < 2000  # of the new process's own pictures
    print(f"ready {recovered_s:.2f} s after kill -9")
    ended, err = served.end()
    assert (ended, err) == (0, "")
    assert [e["line"] for e in served.events if e.get("event") == "said"][-2:] == ["STOPPING=1", "STATUS=draining"]


def test_a_session_that_hangs_is_restarted_by_the_watchdog(
    supervise: Supervise, faulty: Command, clip: Path, tmp_path: Path, status: AskStatus, stopwatch: Stopwatch
) -> None:
    bind = f"ipc://{tmp_path}/ask"
    served = supervise(faulty(clip, "--bind", bind), watchdog_s=2.0)
    stopwatch(lambda: served.count("ready") == 1, within_s=20)
    time.sleep(4.5)  # over two intervals: a healthy one is left alone
    assert served.count("watchdog") == 0
    os.kill(served.pid(), signal.SIGUSR2)
    noticed_s = stopwatch(lambda: served.count("watchdog") == 1, within_s=6)
    stopwatch(lambda: served.count("ready") == 2, within_s=RECOVERED_WITHIN_S)
    with Client(bind, timeout_s=30) as client:
        assert client.answer("Is a lesion visible?").answer in ("yes", "no")
    print(f"the watchdog bit {noticed_s:.2f} s after the session hung")
    assert noticed_s < 2 * 2.0 + 1


def test_a_silent_camera_is_no_reason_to_restart(
    supervise: Supervise, faulty: Command, camera: Any, tmp_path: Path, stopwatch: Stopwatch
) -> None:
    served = supervise(faulty(camera.url, "--bind", f"ipc://{tmp_path}/ask"), watchdog_s=1.0)
    stopwatch(lambda: served.count("ready") == 1, within_s=20)
    camera.running.clear()
    time.sleep(3)
    assert served.count("watchdog") == 0


def test_a_clock_that_is_set_back_changes_nothing_that_is_said(
    supervise: Supervise, faulty: Command, clip: Path, tmp_path: Path, stopwatch: Stopwatch
) -> None:
    bind, hints_bind = f"ipc://{tmp_path}/ask", f"ipc://{tmp_path}/hints"
    served = supervise(faulty(clip, "--bind", bind, "--hints-bind", hints_bind), watchdog_s=2.0)
    stopwatch(lambda: served.count("ready") == 1, within_s=20)
    frames: list[int] = []
    for message in listen(hints_bind, timeout_s=10):
        if isinstance(message, Hint):
            frames.append(message.frame)
            assert 0 < message.age_ms < 2000
            if len(frames) == 20:
                os.kill(served.pid(), signal.SIGUSR1)
            if frames[-1] > frames[0] + 90:
                break
    assert frames == sorted(frames)
    with Client(bind, timeout_s=10) as client:
        answer = client.answer("Why?", deadline_ms=5000)
    assert answer.finish == "stop"  # a deadline is no time of day
    assert 0 < answer.age_ms < 5000
    assert served.count("watchdog") == 0
