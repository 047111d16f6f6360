"""The counters: abstentions, where the time of a frame goes, the memory of the process."""

from collections.abc import Callable
from typing import Any

import pytest

from sonoedge.bundle import HintCalibration
from sonoedge.runtime.client import Client, listen
from sonoedge.runtime.model import Model
from sonoedge.runtime.protocol import Hint, Telemetry
from sonoedge.runtime.server import Server

StartServer = Callable[..., Server]
MakeSource = Callable[..., Any]


def test_stages_add_up_from_capture_to_wire(
    start_server: StartServer, make_source: MakeSource, make_model: Callable[..., Model]
) -> None:
    server = start_server(make_source(fps=20), make_model(step_s=0.005))
    telemetry = next(
        m for m in listen(server.hints_endpoint, timeout_s=30) if isinstance(m, Telemetry) and m.hinted > 5
    )
    assert set(telemetry.stages) == {"wait", "sector", "look", "hints", "wire"}
    assert telemetry.stages["hints"].p50_ms > 5  # the fake takes its time there
    assert telemetry.stages["look"].p50_ms > 0
    for stage in telemetry.stages.values():
        assert 0 <= stage.p50_ms <= stage.p95_ms <= stage.p99_ms
    assert telemetry.p99_ms is not None
    assert telemetry.p99_ms <= sum(stage.p99_ms for stage in telemetry.stages.values()) + 1


def test_abstentions_are_counted(
    start_server: StartServer, make_source: MakeSource, make_model: Callable[..., Model]
) -> None:
    model = make_model(calibration={"region": HintCalibration(temperature=50, abstain_below=0.9)})
    server = start_server(make_source(fps=20), model)
    heard: list[Hint] = []
    for message in listen(server.hints_endpoint, timeout_s=30):
        if isinstance(message, Hint):
            heard.append(message)
        if len(heard) == 30:
            break
    abstained = sum(hint.abstain for hint in heard)
    assert abstained >= 5
    assert server.telemetry().abstentions >= abstained
    assert server.telemetry().abstentions < server.telemetry().hints


def test_memory_is_the_processs_own(start_server: StartServer, make_source: MakeSource) -> None:
    server = start_server(make_source())
    with Client(server.requests_endpoint, timeout_s=30) as client:
        before = client.status().telemetry.resident_bytes
        ballast = bytearray(64 * 2**20)
        ballast[::4096] = b"x" * len(ballast[::4096])
        after = client.status().telemetry.resident_bytes
    if before is None or after is None:
        pytest.skip("waits for a system with /proc")
    assert after - before > 48 * 2**20
