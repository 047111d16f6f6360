"""Frames of picture folders and DICOM clips: which ones, in which order, cropped how, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ComprehensiveSRStorage, ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage

from sonoedge.calibration.frames import CLIP_FRAMES, Frames
from sonoedge.errors import SonoEdgeError

REGION = {  # the columns 10 to 49 and the rows 8 to 31
    "RegionSpatialFormat": 1,
    "RegionLocationMinX0": 10,
    "RegionLocationMinY0": 8,
    "RegionLocationMaxX1": 49,
    "RegionLocationMaxY1": 31,
}


def write_picture(path: Path, grey: int, *, size: tuple[int, int] = (20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), grey, np.uint8))


def write_dicom(path: Path, pixels: npt.NDArray[np.uint8] | None, *, region: bool = False) -> Path:
    """Write a clip of grey pixels [frames, rows, columns], or a report without any."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = ComprehensiveSRStorage if pixels is None else UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.PatientName = "Nobody"
    if pixels is not None:
        dataset.NumberOfFrames, dataset.Rows, dataset.Columns = pixels.shape
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
        dataset.PixelData = pixels.tobytes()
    if region:
        item = Dataset()
        for name, value in REGION.items():
            setattr(item, name, value)
        dataset.SequenceOfUltrasoundRegions = [item]
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def clip(count: int, first: int = 0) -> npt.NDArray[np.uint8]:
    """Frames [count, 40, 60] that are as bright as their number."""
    return np.tile(np.arange(first, first + count, dtype=np.uint8)[:, None, None], (1, 40, 60))


def brightness(frames: Frames) -> list[int]:
    return [int(frames[index][0, 0, 0]) for index in range(len(frames))]


def test_pictures_come_in_natural_order_with_their_subfolders(tmp_path: Path) -> None:
    for number, name in enumerate(("a/frame_2.png", "a/frame_10.PNG", "b/1.bmp", "c2/x.tif", "c10/x.tiff", "d.jpeg")):
        write_picture(tmp_path / name, 10 * number)
    write_picture(tmp_path / ".thumbnails" / "x.png", 255)
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / "empty").touch()
    frames = Frames(tmp_path)
    assert len(frames) == 6
    assert brightness(frames) == [0, 10, 20, 30, 40, 50]
    assert frames[1].shape == (20, 30, 3)
    assert frames.name(1) == str(tmp_path / "a" / "frame_10.PNG")
    assert [path.name for path in frames.files] == ["frame_2.png", "frame_10.PNG", "1.bmp", "x.tif", "x.tiff", "d.jpeg"]


def test_one_picture_is_one_frame(tmp_path: Path) -> None:
    write_picture(tmp_path / "one.png", 7)
    assert brightness(Frames(tmp_path / "one.png")) == [7]


def test_a_short_clip_gives_all_its_frames_and_a_long_one_evenly_spaced_ones(tmp_path: Path) -> None:
    assert brightness(Frames(write_dicom(tmp_path / "short.dcm", clip(5)))) == [0, 1, 2, 3, 4]
    frames = Frames(write_dicom(tmp_path / "long.dcm", clip(100)))
    seen = brightness(frames)
    assert len(seen) == CLIP_FRAMES
    assert set(np.diff(seen)) == {3, 4}
    assert seen[0] == 99 - seen[-1]
    assert frames.name(2) == f"{tmp_path / 'long.dcm'} frame 3"


def test_clips_are_cropped_to_their_ultrasound_region(tmp_path: Path) -> None:
    pixels = clip(2, first=9)
    pixels[:, :8] = 255  # the patient's name
    frames = Frames(write_dicom(tmp_path / "clip.dcm", pixels, region=True))
    for index in range(2):
        assert frames[index].shape == (24, 40, 3)
        assert frames[index].dtype == np.uint8
        assert (frames[index] == 9 + index).all()


def test_a_dicom_folder_is_read_file_by_file_whatever_the_files_are_called(tmp_path: Path) -> None:
    write_dicom(tmp_path / "study" / "IM_2", clip(2, 20))
    write_dicom(tmp_path / "study" / "IM_10", clip(3, 30))
    write_dicom(tmp_path / "study" / "SR_1.dcm", None)
    write_dicom(tmp_path / "DICOMDIR", None)
    write_picture(tmp_path / "study" / "JM.png", 40)
    frames = Frames(tmp_path)
    assert brightness(frames) == [20, 21, 30, 31, 32, 40]
    assert [int(frames[index][0, 0, 0]) for index in (3, 0, 5, 4)] == [31, 20, 40, 32]


def test_the_frames_are_those_of_the_file_itself(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 24), np.uint8)
    path = write_dicom(tmp_path / "clip.dcm", pixels)
    frames = Frames(path)
    for index, wanted in enumerate(pydicom.dcmread(path).pixel_array):
        assert np.array_equal(frames[index], np.repeat(wanted[..., None], 3, axis=2))


@pytest.mark.parametrize(
    ("prepare", "wanted"),
    [
        (lambda folder: folder.rmdir(), r"data does not exist: name a conversation file"),
        (lambda folder: None, r"data holds no frame: put pictures \(\.png \.jpg"),
        (lambda folder: (folder / "a.txt").write_text("x"), r"data holds no frame"),
        (lambda folder: write_dicom(folder / "report.dcm", None), r"data holds no frame"),
        (lambda folder: (folder / "bad.dcm").write_bytes(b"x" * 200), r"bad\.dcm is not a DICOM file .*: remove it"),
        (lambda folder: (folder / "IM_1").write_bytes(b"\0" * 128 + b"DICM"), r"data holds no frame"),
    ],
    ids=["missing", "empty", "other files", "a report", "no DICOM", "a header alone"],
)
def test_data_without_a_frame_is_refused(tmp_path: Path, prepare: Callable[[Path], object], wanted: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(SonoEdgeError, match=wanted):
        Frames(folder)


def test_a_damaged_file_is_named_when_its_frame_is_read(tmp_path: Path) -> None:
    write_picture(tmp_path / "1.png", 1)
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    frames = Frames(tmp_path)
    assert int(frames[0][0, 0, 0]) == 1
    with pytest.raises(SonoEdgeError, match=r"2\.png is not a picture that can be read"):
        frames[1]


def test_a_clip_that_is_shorter_than_it_says_is_refused(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "cut.dcm", clip(6))
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"IS\x02\x006 ", b"IS\x02\x009 "))
    frames = Frames(path)
    assert len(frames) == 9
    with pytest.raises(SonoEdgeError, match=r"cut\.dcm"):
        frames[0]
