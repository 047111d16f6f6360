"""Frames kept beside the audit log: those it is about, within their bound, never more than the sector."""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from sonoedge.runtime.audit import AuditLog
from sonoedge.runtime.audit_chain import read_records, segments
from sonoedge.runtime.client import Client
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.kept_frames import WAITING, FrameKeeper, KeptFrames
from sonoedge.runtime.model import Model
from sonoedge.runtime.server import Server
from sonoedge.runtime.sight import Sight

Picture = npt.NDArray[np.uint8]


def sight(image: Picture, sequence: int) -> Sight:
    return Sight(Frame(image, sequence, 0, None, "test"))


def test_frames_are_kept_within_their_bound_by_run_and_sequence(
    tmp_path: Path, noise: Callable[..., np.ndarray[Any, np.dtype[np.uint8]]]
) -> None:
    sector = noise(60, 80)
    size = KeptFrames(tmp_path / "probe", 10**6, 1).keep(0, sector).stat().st_size
    kept = KeptFrames(tmp_path / "frames", 4 * size, run=7)
    for sequence in range(10):
        kept.keep(sequence, sector)
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == [f"{7:012d}-{sequence:012d}.jpg" for sequence in range(6, 10)]
    KeptFrames(tmp_path / "frames", 4 * size, run=31).keep(0, sector)  # a later run, whose numbers begin anew
    names = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert names == [*(f"{7:012d}-{sequence:012d}.jpg" for sequence in range(7, 10)), f"{31:012d}-{0:012d}.jpg"]


def test_a_frame_is_kept_once_however_often_it_is_spoken_of(tmp_path: Path, noise: Callable[..., Picture]) -> None:
    folder = KeptFrames(tmp_path, 10**6, 1)
    first = folder.keep(5, noise(60, 80))
    before = first.stat().st_mtime_ns
    folder.keep(6, noise(60, 80))
    assert folder.keep(5, noise(60, 80)) == first
    assert first.stat().st_mtime_ns == before


def test_a_disk_that_refuses_is_told_to_the_audit_log(
    tmp_path: Path, noise: Callable[..., Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, Mapping[str, Any]]] = []
    keeper = FrameKeeper(KeptFrames(tmp_path, 10**6, 1), lambda kind, fields: told.append((kind, fields)))

    def full(path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        said = keeper.keep(sight(noise(60, 80), 1))
        keeper.close()
    assert told == [("not_kept", {"file": said["kept"], "problem": "No space left on device"})]
    assert list(tmp_path.iterdir()) == []


def test_a_slow_disk_holds_nobody_up(
    tmp_path: Path, noise: Callable[..., Picture], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, slow = KeptFrames(tmp_path, 10**7, 1), threading.Event()
    monkeypatch.setattr(folder, "keep", lambda _sequence, _sector: slow.wait(30))
    keeper = FrameKeeper(folder, lambda _kind, _fields: None)
    said = [keeper.keep(sight(noise(60, 80), sequence)) for sequence in range(WAITING + 3)]
    assert "kept" in said[0]
    assert said[-1] == {"not_kept": f"{WAITING} frames wait for the disk"}
    slow.set()
    keeper.close()


def test_the_log_names_the_pictures_of_what_was_said(
    tmp_path: Path, make_source: Callable[..., Any], make_model: Callable[..., Model]
) -> None:
    source = make_source()
    source.brightness = 200
    with AuditLog(tmp_path / "log") as log:
        keeper = FrameKeeper(KeptFrames(tmp_path / "frames", 10**7, log.head.seq + 1), log.record)
        server = Server(
            make_model(),
            source,
            bind="tcp://127.0.0.1:*",
            hints_bind="tcp://127.0.0.1:*",
            audit=log.record,
            keep=keeper.keep,
        )
        server.start()
        try:
            while server.telemetry().hinted == 0:
                time.sleep(0.01)
            with Client(server.requests_endpoint, timeout_s=20) as client:
                client.freeze("before")
                answer = client.answer("What?", frames=["before"])
        finally:
            server.stop()
            keeper.close()
    records = [record for path in segments(tmp_path / "log") for _, record in read_records(path)]
    kept = {path.name: cv2.imread(str(path)) for path in (tmp_path / "frames").iterdir()}
    assert kept.keys() == {
        seen["kept"]
        for record in records
        for seen in [record.fields, *record.fields.get("seen", [])]
        if seen.get("kept")
    }
    (told,) = [record for record in records if record.kind == "answer"]
    picture = kept[told.fields["seen"][0]["kept"]]
    assert told.fields["seen"][0]["kept"].endswith(f"{answer.frame:012d}.jpg")
    assert picture is not None
    assert abs(float(picture.mean()) - 200) < 3
