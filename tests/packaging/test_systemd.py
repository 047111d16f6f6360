"""The systemd unit: systemd accepts it, and its times fit those of the process that it watches."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sonoedge.runtime.serve import DRAIN_S, POLL_S

UNIT = Path(__file__).parents[2] / "packaging" / "systemd" / "sonoedge.service"


def settings(section: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    here = ""
    for line in UNIT.read_text().splitlines():
        if line.startswith("["):
            here = line.strip("[]")
        elif here == section and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("waits for systemd-analyze (Debian's package systemd)")
    program = "/opt/sonoedge/bin/sonoedge"
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(program, shutil.which("true") or "/bin/true"))
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_it_is_ready_when_it_says_so_and_watched() -> None:
    service = settings("Service")
    assert service["Type"] == ["notify"]
    assert service["ExecStart"] == ["/opt/sonoedge/bin/sonoedge serve --config /etc/sonoedge/serve.toml"]
    assert service["Restart"] == ["always"]
    assert settings("Unit")["StartLimitIntervalSec"] == ["0"]
    assert float(service["WatchdogSec"][0]) / 2 > 10 * POLL_S
    assert float(service["TimeoutStopSec"][0]) > DRAIN_S


def test_it_may_do_little() -> None:
    service = settings("Service")
    assert service["User"] == ["sonoedge"]
    for key in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "ProtectKernelTunables", "RestrictSUIDSGID"):
        assert service[key] == ["yes"]
    assert service["ProtectSystem"] == ["strict"]
    assert service["CapabilityBoundingSet"] == [""]
    assert service["DevicePolicy"] == ["closed"]
