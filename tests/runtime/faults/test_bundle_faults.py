"""What happens to the bundle: a file is damaged while it is served; `current` is switched to an update and back."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import pytest

from sonoedge.bundle import MANIFEST_FILE, open_bundle
from sonoedge.calibration.phantom import phantom
from sonoedge.development_key import sign_for_this_account
from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.protocol import Hint

Supervise = Callable[..., Any]
Stopwatch = Callable[..., float]
RECOVERED_WITHIN_S = 15.0
SERVE = [sys.executable, "-c", "import sys; from sonoedge.cli import main; sys.exit(main())", "serve"]


@pytest.fixture
def bundles(tiny: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Two versions of the smallest bundle, of which the second says another intended use, and `current` → the first."""
    first, second = tmp_path / "v1", tmp_path / "v2"
    for folder in (first, second):
        shutil.copytree(tiny.bundle, folder)
    manifest = msgspec.json.decode((second / MANIFEST_FILE).read_bytes())
    manifest["intended_use"] += " Second version."
    (second / MANIFEST_FILE).write_bytes(msgspec.json.encode(manifest))
    for folder in (first, second):
        sign_for_this_account(folder)
    (tmp_path / "current").symlink_to(first.name)
    return first, second


def switch(link: Path, to: Path) -> None:
    """Point the link elsewhere in one step, as `ln -sfn` in a temporary name and `mv -T` do."""
    new = link.with_name("next")
    new.symlink_to(to.name)
    new.replace(link)


def command(bundle: Path, source: Path, folder: Path) -> list[str]:
    endpoints = ["--bind", f"ipc://{folder}/ask", "--hints-bind", f"ipc://{folder}/hints"]
    return [*SERVE, str(bundle), "--source", str(source), *endpoints, "--json"]


def candidates(endpoint: str) -> dict[str, dict[str, float]]:
    """Every hint's candidates for a picture that stands still, whatever smoothing makes of them later."""
    heard: dict[str, dict[str, float]] = {}
    for message in listen(endpoint, timeout_s=30):
        if isinstance(message, Hint):
            if message.hint in heard:
                return heard
            heard[message.hint] = message.candidates
    raise AssertionError("unreachable: listen raises")


def test_a_file_damaged_while_it_is_served(
    supervise: Supervise, bundles: tuple[Path, Path], tmp_path: Path, stopwatch: Stopwatch
) -> None:
    current, still = tmp_path / "current", tmp_path / "still.png"
    cv2.imwrite(str(still), phantom(3).image[64:160, 48:176])  # all tissue
    served = supervise(command(current, still, tmp_path))
    stopwatch(lambda: served.count("ready") >= 1, within_s=20)
    with Client(f"ipc://{tmp_path}/ask", timeout_s=30) as client:
        said = candidates(f"ipc://{tmp_path}/hints")
        client.answer("Is a lesion visible?", max_tokens=4)  # shares no prefix, and so is rounded otherwise
        before = client.answer("Is a lesion visible?", max_tokens=4)
        root = bundles[0]
        manifest = open_bundle(root).manifest
        for name in manifest.files:  # every one of them: written over, then cut short
            path = root / name
            with path.open("r+b") as file:
                file.write(b"\xff" * min(4096, path.stat().st_size))
                file.truncate(path.stat().st_size // 2)
        after = client.answer("Is a lesion visible?", max_tokens=4)
        # What is served was read, checked and kept: it goes on, and says the same of the same picture.
        assert (after.answer, after.model) == (before.answer, before.model)
        assert candidates(f"ipc://{tmp_path}/hints") == said
        assert served.count("exited") == 0
        # A restart finds the damage and refuses; the last good bundle is one link away.
        pid = served.pid()
        os.kill(pid, signal.SIGKILL)
        stopwatch(lambda: served.count("exited") >= 2, within_s=RECOVERED_WITHIN_S)
        assert [e["status"] for e in served.events if e.get("event") == "exited"][1] == 2
        switch(current, bundles[1])
        ready = served.count("ready")
        recovered_s = stopwatch(lambda: served.count("ready") > ready, within_s=RECOVERED_WITHIN_S)
        assert client.answer("Is a lesion visible?", max_tokens=4).intended_use.endswith("Second version.")
    print(f"served again {recovered_s:.2f} s after the switch to the good bundle")
    _, err = served.end()
    assert "has changed since the bundle was built" in err or "bytes long, not" in err


def test_an_update_is_a_switched_link_and_so_is_the_way_back(
    supervise: Supervise, bundles: tuple[Path, Path], clip: Path, tmp_path: Path, stopwatch: Stopwatch
) -> None:
    current, (first, second) = tmp_path / "current", bundles
    uses = {bundle: open_bundle(bundle).manifest.intended_use for bundle in bundles}
    served = supervise(command(current, clip, tmp_path))
    stopwatch(lambda: served.count("ready") == 1, within_s=20)
    with Client(f"ipc://{tmp_path}/ask", timeout_s=30) as client:

        def change(to: Path, before: Path, starts: int) -> float:
            switch(current, to)
            assert client.status().intended_use == uses[before]  # what runs is what was started
            os.kill(served.pid(), signal.SIGKILL)
            took_s = stopwatch(lambda: served.count("ready") == starts, within_s=RECOVERED_WITHIN_S)
            assert client.status().intended_use == uses[to]
            heard = next(m for m in listen(f"ipc://{tmp_path}/hints", timeout_s=10) if isinstance(m, Hint))
            assert heard.intended_use == uses[to]
            return took_s

        print(f"updated after {change(second, first, 2):.2f} s, back after {change(first, second, 3):.2f} s")
