"""Feeds: what they yield, their pace, and how each refuses what it cannot play."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.sources import Source, open_source
from sonoedge.runtime.sources import feed as feed_module
from sonoedge.runtime.sources.live import LiveSource
from sonoedge.runtime.sources.pace import Pacer
from sonoedge.runtime.sources.regions import find_region

WriteVideo = Callable[..., Path]


def frames(source: Source, count: int | None = None) -> list[Frame]:
    """Take `count` frames, or all, and close."""
    taken = list(itertools.islice(source, count))
    source.close()
    return taken


def test_a_video_plays_its_frames_in_rgb(write_video: WriteVideo) -> None:
    source = open_source(str(write_video(frames=5, fps=50)), once=True)
    taken = frames(source)
    assert (source.fps, source.state) == (50, "ended")
    assert [frame.sequence for frame in taken] == [0, 1, 2, 3, 4]
    for number, frame in enumerate(taken):
        assert frame.image.shape == (48, 64, 3)
        assert frame.image.flags.c_contiguous
        assert abs(int(frame.image.mean()) - 10 * number) <= 2


def test_a_video_loops_unless_once(write_video: WriteVideo) -> None:
    taken = frames(open_source(str(write_video(frames=3, fps=100))), 7)
    assert [frame.sequence for frame in taken] == list(range(7))
    assert abs(int(taken[6].image.mean()) - int(taken[0].image.mean())) <= 2


class Clock(threading.Event):
    """A monotonic clock, and the event to wait on, that pass time at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now_ns = 5_000_000_000

    def monotonic_ns(self) -> int:
        return self.now_ns

    def wait(self, timeout: float | None = None) -> bool:
        self.now_ns += round((timeout or 0) * 1e9)
        return self.is_set()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("sonoedge.runtime.sources.recorded.time", clock)
    monkeypatch.setattr("sonoedge.runtime.sources.pace.time", clock)
    return clock


def test_the_pace_does_not_drift_nor_bunch_up(clock: Clock) -> None:
    pacer, ticks_ms = Pacer(30, clock), []
    for number in range(90):
        clock.now_ns += 7_000_000  # the work between ticks
        if number == 5:
            clock.now_ns += 105_000_000  # late by more than three ticks: they are left out
        assert pacer.wait()
        ticks_ms.append((clock.now_ns - 5_007_000_000) / 1e6)
    assert ticks_ms[4] == pytest.approx(4 * 1000 / 30)
    assert ticks_ms[5] == pytest.approx(ticks_ms[4] + 112)  # at once
    np.testing.assert_allclose(ticks_ms[6:], (np.arange(6, 90) + 2) * 1000 / 30)
    clock.set()
    assert not pacer.wait()


def test_fps_replaces_the_feeds_own_rate(write_video: WriteVideo, clock: Clock) -> None:
    path = str(write_video(frames=5, fps=20))
    for fps, gap_ms in ((None, 50), (100.0, 10)):
        source = open_source(path, fps=fps)
        source._stop = clock  # type: ignore[attr-defined]
        stamps = [frame.captured_ns for frame in itertools.islice(source, 11)]
        np.testing.assert_allclose(np.diff(stamps) / 1e6, gap_ms)


def test_closing_ends_a_slow_feed_at_once(write_video: WriteVideo) -> None:
    source = open_source(str(write_video(frames=3, fps=20)), fps=0.1)
    threading.Timer(0.1, source.close).start()
    began = time.monotonic()
    assert len(list(source)) == 1
    assert time.monotonic() - began < 2
    assert source.state == "ended"


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "I;16"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))
    if mode == "I;16":
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    else:
        Image.fromarray(grey).convert("RGB").convert(mode).save(tmp_path / "a.png")
    (frame,) = frames(open_source(str(tmp_path / "a.png"), once=True))
    assert frame.image.shape == (32, 64, 3)
    assert frame.image.dtype == np.uint8
    assert frame.image[:, -1].mean() > frame.image[:, 0].mean() + 200


def test_a_folder_plays_in_natural_order_and_ignores_other_files(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    source = open_source(str(tmp_path), once=True, fps=200)
    assert [frame.image[0, 0, 0] for frame in source] == [1, 2, 10]


def test_a_still_picture_is_a_feed(tmp_path: Path) -> None:
    Image.new("L", (40, 30), 7).save(tmp_path / "a.png")
    taken = frames(open_source(str(tmp_path / "a.png"), fps=200), 4)
    assert [frame.sequence for frame in taken] == [0, 1, 2, 3]


def test_the_real_clip(clip: Path) -> None:
    source = open_source(str(clip), once=True, fps=1000)
    taken = frames(source)
    assert len(taken) == 30
    # its regions are in pixels of the 640x480 screen, its pictures are half that
    assert taken[0].sector == (42, 15, 298, 207)
    assert taken[0].spacing_mm == pytest.approx(1.02099, abs=1e-4)
    image = taken[0].image
    assert image.shape == (240, 320, 3)
    marker = image[15:25, 185:195].reshape(-1, 3).mean(axis=0)  # the scanner's marker is green, in YBR it would not be
    assert marker[1] > marker[0] + 10
    assert open_source(str(clip)).fps == pytest.approx(30, abs=0.01)


def dicom(path: Path, pixels: npt.NDArray[np.generic], interpretation: str, **tags: object) -> Path:
    """Write an uncompressed DICOM picture or clip."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    colour = pixels.shape[-1] == 3
    shape = pixels.shape[:-1] if colour else pixels.shape
    dataset.Rows, dataset.Columns = shape[-2:]
    if len(shape) == 3:
        dataset.NumberOfFrames = shape[0]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = interpretation
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = 0
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_dicom_colours_and_depths(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (2, 32, 1))
    for name, pixels, interpretation, tags, corner in [
        ("grey", ramp, "MONOCHROME2", {}, (0, 252)),
        ("inverse", ramp, "MONOCHROME1", {}, (255, 3)),
        ("deep", ramp.astype(np.uint16) << 4, "MONOCHROME2", {"BitsStored": 12, "HighBit": 11}, (0, 252)),
        ("rgb", np.repeat(ramp[..., None], 3, axis=3), "RGB", {}, (0, 252)),
    ]:
        path = dicom(tmp_path / f"{name}.dcm", pixels, interpretation, **tags)
        image = frames(open_source(str(path), once=True, fps=500))[0].image
        assert image.shape == (32, 64, 3)
        assert (image[0, 0, 1], image[0, -1, 1]) == corner, name


def test_a_dicom_palette_is_applied(tmp_path: Path) -> None:
    red = np.arange(256, dtype=np.uint16) * 257
    tags: dict[str, object] = {}
    for colour, table in (("Red", red), ("Green", red * 0), ("Blue", red[::-1])):
        tags[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{colour}PaletteColorLookupTableData"] = table.astype("<u2").tobytes()
    path = dicom(tmp_path / "a.dcm", np.full((8, 8), 200, np.uint8), "PALETTE COLOR", **tags)
    (frame,) = frames(open_source(str(path), once=True))
    assert frame.image[0, 0].tolist() == [200, 0, 55]


@pytest.mark.parametrize(
    ("tags", "fps"),
    [
        ({"CineRate": 25, "FrameTime": 10}, 25),
        ({"FrameTime": 40}, 25),
        ({"RecommendedDisplayFrameRate": 15}, 15),
        ({}, 10),
    ],
)
def test_dicom_frame_rates(tmp_path: Path, tags: dict[str, object], fps: float) -> None:
    path = dicom(tmp_path / "a.dcm", np.zeros((2, 8, 8), np.uint8), "MONOCHROME2", **tags)
    assert open_source(str(path)).fps == pytest.approx(fps)


def region(x0: int, y0: int, x1: int, y1: int, **tags: object) -> Dataset:
    """One item of SequenceOfUltrasoundRegions."""
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType = 1, 1
    item.RegionLocationMinX0, item.RegionLocationMinY0 = x0, y0
    item.RegionLocationMaxX1, item.RegionLocationMaxY1 = x1, y1
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX = item.PhysicalDeltaY = 0.02
    for name, value in tags.items():
        setattr(item, name, value)
    return item


def test_the_largest_flat_region_wins() -> None:
    dataset = Dataset()
    dataset.SequenceOfUltrasoundRegions = [
        region(0, 0, 9, 9),
        region(10, 20, 59, 79),
        region(0, 0, 99, 99, RegionSpatialFormat=3),  # a spectrum
    ]
    found = find_region(dataset, 100, 100)
    assert found is not None
    assert found.sector == (10, 20, 60, 80)
    assert found.spacing_mm == pytest.approx(0.2)


HUGE = {"PhysicalDeltaX": 1e300, "PhysicalDeltaY": 1e300}


@pytest.mark.parametrize(
    "tags", [{"PhysicalUnitsXDirection": 4}, {"PhysicalDeltaX": 0.01}, {"PhysicalDeltaY": 0.0}, HUGE]
)
def test_spacing_is_unknown_when_not_square_centimetres(tags: dict[str, object]) -> None:
    dataset = Dataset()
    dataset.SequenceOfUltrasoundRegions = [region(0, 0, 9, 9, **tags)]
    found = find_region(dataset, 100, 100)
    assert found is not None
    assert found.spacing_mm is None


def test_regions_that_cannot_be_are_ignored() -> None:
    dataset = Dataset()
    assert find_region(dataset, 100, 100) is None
    several = region(0, 0, 9, 9)
    several.RegionLocationMinX0 = [1, 2]
    empty = region(0, 0, 9, 9, RegionSpatialFormat=None)
    dataset.SequenceOfUltrasoundRegions = [several, empty]
    assert find_region(dataset, 100, 100) is None
    dataset.SequenceOfUltrasoundRegions = [region(9, 9, 2, 2), region(0, 0, 5000, 50)]
    assert find_region(dataset, 100, 100) is None


def write(path: Path, content: bytes = b"nothing to see") -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.mp4", "does not exist"),
        (lambda folder: folder, "holds no picture"),
        (lambda folder: write(folder / "a.png"), "not a picture"),
        (lambda folder: write(folder / "a.mp4"), "no video"),
        (lambda folder: write(folder / "a.mp4", b""), "no video"),
        (lambda folder: write(folder / "a.dcm"), "not a DICOM file"),
        (lambda folder: write(folder / "a.dcm", b"\0" * 128 + b"DICM" + b"\x02"), "a.dcm"),
        (lambda folder: "/dev/video987", "no device"),
        (lambda folder: "987", "does not answer"),
        (lambda folder: "rtsp://127.0.0.1:9/none", "does not answer"),
        (lambda folder: "ftp://host/clip", "unknown scheme"),
    ],
)
@pytest.mark.filterwarnings("default::UserWarning")
def test_what_cannot_be_played_is_refused_when_opened(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    spec = str(make(tmp_path))
    with pytest.raises(SonoEdgeError, match=message) as refusal:
        open_source(spec)
    assert spec in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_video_without_frames_is_refused(write_video: WriteVideo, tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"no frames|no video"):
        open_source(str(write_video(frames=0)))


def test_a_bad_picture_in_a_folder_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    write(tmp_path / "b.png")
    with pytest.raises(SonoEdgeError, match=r"b\.png is not a picture"):
        open_source(str(tmp_path))


def test_a_truncated_picture_is_refused(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    write(tmp_path / "a.png", whole[: len(whole) // 2])
    with pytest.raises(SonoEdgeError, match="can be read"):
        open_source(str(tmp_path / "a.png"))


def test_dicom_without_pixels_is_refused(tmp_path: Path, clip: Path) -> None:
    dataset = pydicom.dcmread(clip)
    del dataset.PixelData
    dataset.save_as(tmp_path / "report.dcm")
    with pytest.raises(SonoEdgeError, match="has no pixels"):
        open_source(str(tmp_path / "report.dcm"))


def test_dicom_is_known_by_its_content(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "IM000001").write_bytes(clip.read_bytes())
    assert open_source(str(tmp_path / "IM000001")).fps == pytest.approx(30, abs=0.01)


def test_dicom_that_cannot_be_decoded_is_refused(tmp_path: Path, clip: Path) -> None:
    dataset = pydicom.dcmread(clip)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(SonoEdgeError, match="JPEG-LS"):
        open_source(str(tmp_path / "a.dcm"))


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), 1e9])
def test_a_wrong_rate_is_refused(clip: Path, fps: float) -> None:
    with pytest.raises(SonoEdgeError, match="frame rate"):
        open_source(str(clip), fps=fps)


def test_a_folder_that_vanishes_is_reported(write_video: WriteVideo) -> None:
    path = write_video(frames=2, fps=200)
    source = open_source(str(path))
    iterator = iter(source)
    next(iterator)
    path.unlink()
    with pytest.raises(SonoEdgeError, match="no video"):
        list(iterator)


class FakeCamera:
    """Gives the frames of one connection, then fails."""

    def __init__(self, readings: Iterator[bool]) -> None:
        self.readings = readings
        self.released = False

    def read(self) -> tuple[bool, npt.NDArray[np.uint8]]:
        blue_first = np.zeros((4, 4, 3), np.uint8)
        blue_first[:, :, 0] = 200
        return next(self.readings, False), blue_first

    def get(self, prop: int) -> float:
        return 25.0 if prop == cv2.CAP_PROP_FPS else 0.0

    def release(self) -> None:
        self.released = True


def test_a_live_feed_connects_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "FIRST_PAUSE_S", 0.01)
    cameras = [FakeCamera(iter([True, True])), None, None, FakeCamera(iter([True]))]
    states: list[str] = []

    def connect(spec: str, fps: float | None) -> FakeCamera | None:
        if len(cameras) < 4:
            states.append(source.state)
        return cameras.pop(0) if cameras else None

    first = cameras[0]
    source = LiveSource("0", connect=connect)
    assert (source.fps, source.state) == (25, "waiting")
    taken = []
    for frame in source:
        taken.append(frame)
        assert source.state == "live"
        if len(taken) == 3:
            source.close()
    assert first is not None
    assert first.released
    assert [frame.sequence for frame in taken] == [0, 1, 2]
    assert taken[0].image[0, 0].tolist() == [0, 0, 200]
    assert states == ["lost", "lost", "lost"]
    assert source.state == "ended"


def test_frames_of_another_kind_are_left_out_and_told() -> None:
    class DepthCamera(FakeCamera):
        def read(self) -> tuple[bool, npt.NDArray[Any]]:
            ok, picture = super().read()
            first = not self.deep
            self.deep = True
            return ok, np.zeros((4, 4), np.uint16) if first else picture

        deep = False

    source = LiveSource("0", once=True, connect=lambda spec, fps: DepthCamera(iter([True, True])))
    taken = iter(source)
    assert next(taken).image.shape == (4, 4, 3)
    assert source.detail == "frames of uint16 [4, 4] are left out: set the device to colour"
    assert list(taken) == []


def test_the_drivers_time_is_taken_where_it_is_of_the_monotonic_clock() -> None:
    class Stamping(FakeCamera):
        def get(self, prop: int) -> float:
            return (stamps_ns.pop(0) if prop == cv2.CAP_PROP_POS_MSEC else 0) / 1e6

    began_ns = time.monotonic_ns()
    wall_ns = 1_700_000_000_000_000_000  # of a driver that stamps by the wall clock
    stamps_ns = [began_ns - 30_000_000, wall_ns, wall_ns + 40_000_000, wall_ns - 3600 * 10**9]
    source = LiveSource("0", once=True, connect=lambda spec, fps: Stamping(iter([True] * 4)))
    own, first, second, set_back = (frame.captured_ns for frame in source)
    assert own == pytest.approx(began_ns - 30_000_000, abs=1000)
    assert began_ns <= first <= time.monotonic_ns()
    assert first < set_back <= time.monotonic_ns()
    assert second <= time.monotonic_ns()


def test_a_password_is_in_no_name_and_no_message() -> None:
    connected = LiveSource("rtsp://me:s3cret@127.0.0.1/probe", connect=lambda spec, fps: FakeCamera(iter([])))
    assert connected.name == "rtsp://127.0.0.1/probe"
    seen: list[str] = []
    with pytest.raises(SonoEdgeError, match="does not answer") as refusal:
        LiveSource("rtsp://me:s3cret@127.0.0.1/probe", connect=lambda spec, fps: seen.append(spec))
    assert "s3cret" not in str(refusal.value)
    assert "s3cret" in seen[0]


def test_once_ends_a_live_feed_that_fails() -> None:
    source = LiveSource("0", once=True, connect=lambda spec, fps: FakeCamera(iter([True, True])))
    assert len(list(source)) == 2
    assert source.state == "ended"
