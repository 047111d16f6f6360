"""Folders named as classes become single choices; of DICOM files only the sector is ever seen."""

from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage

from sonoedge.calibration.case_pictures import read_case_picture
from sonoedge.calibration.labelled_folder import is_labelled, read_answered, read_labelled
from sonoedge.calibration.questions import Task, questions
from sonoedge.errors import SonoEdgeError

SECTOR = {"MinX0": 10, "MinY0": 8, "MaxX1": 49, "MaxY1": 31}  # the columns 10 to 49 and the rows 8 to 31
TEXT = 255  # grey of what is burned in beside it


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((20, 30, 3), 90, np.uint8))


def dicom(path: Path, *, region: bool, burned_in: str | None = None, frames: int = 5) -> Path:
    """A clip whose frames are as bright as their number inside the sector, with bright text outside it."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UltrasoundMultiFrameImageStorage, UID("1.2.3")
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientName, data.PatientID = "Secret^Name", "SECRET-ID"
    pixels = np.full((frames, 40, 60), TEXT, np.uint8)
    pixels[:, 8:32, 10:50] = np.arange(frames)[:, None, None]
    data.NumberOfFrames, data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    if burned_in is not None:
        data.BurnedInAnnotation = burned_in
    if region:
        item = Dataset()
        item.RegionSpatialFormat = 1
        for name, value in SECTOR.items():
            setattr(item, f"RegionLocation{name}", value)
        data.SequenceOfUltrasoundRegions = [item]
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def test_every_picture_is_a_choice_among_the_classes(tmp_path: Path) -> None:
    for name in ("breast/malignant/b10.png", "breast/malignant/b2.png", "breast/benign/a.jpg", "breast/.hidden/c.png"):
        picture(tmp_path / name)
    dicom(tmp_path / "breast/normal/IM0001", region=True)
    (tmp_path / "breast/normal/notes.txt").write_text("x")
    folder = tmp_path / "breast"
    assert is_labelled(folder)
    cases = read_labelled(folder)
    assert [case.id for case in cases] == ["benign/a.jpg", "malignant/b2.png", "malignant/b10.png", "normal/IM0001"]
    assert {case.shown for case in cases} == {"breast"}
    asked = [questions(case)[0] for case in cases]
    assert [question.task for question in asked] == [Task.DIAGNOSIS] * 4
    assert asked[0].classes == ("benign", "malignant", "normal")
    assert [question.right for question in asked] == [0, 1, 1, 2]
    assert read_answered(folder) == cases


@pytest.mark.parametrize("names", [["a.png", "b.png"], ["one/a.png"], ["one/a.png", "two/b.png", "c.png"]])
def test_other_folders_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        picture(tmp_path / name)
    assert not is_labelled(tmp_path)
    with pytest.raises(SonoEdgeError, match="a folder for each class"):
        read_labelled(tmp_path)


def test_more_classes_than_letters_are_refused(tmp_path: Path) -> None:
    for number in range(11):
        picture(tmp_path / f"c{number}" / "a.png")
    with pytest.raises(SonoEdgeError, match="11 classes"):
        read_labelled(tmp_path)


def test_of_a_clip_the_middle_frame_is_seen_and_nothing_outside_the_sector(tmp_path: Path) -> None:
    found = read_case_picture(dicom(tmp_path / "clip.dcm", region=True))
    assert found.shape == (24, 40, 3)
    assert np.unique(found).tolist() == [2]


def test_a_clip_without_a_region_is_seen_only_where_it_vouches_that_no_text_is_burned_in(tmp_path: Path) -> None:
    for burned_in in (None, "YES"):
        with pytest.raises(SonoEdgeError, match="names no two-dimensional ultrasound region") as refused:
            read_case_picture(dicom(tmp_path / "clip.dcm", region=False, burned_in=burned_in))
        assert "ecret" not in str(refused.value)
    assert read_case_picture(dicom(tmp_path / "clip.dcm", region=False, burned_in="NO")).shape == (40, 60, 3)


def test_no_tag_of_a_patient_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = pydicom.Dataset.__getattr__

    def spy(self: pydicom.Dataset, name: str) -> object:
        asked.append(name)
        return original(self, name)

    path = dicom(tmp_path / "clip.dcm", region=True)
    monkeypatch.setattr(pydicom.Dataset, "__getattr__", spy)
    read_case_picture(path)
    assert "Rows" in asked
    assert not [name for name in asked if name.startswith("Patient")]


def test_a_file_that_is_no_picture_is_named(tmp_path: Path) -> None:
    junk = tmp_path / "x.png"
    junk.write_bytes(b"\x00\xff" * 50)
    with pytest.raises(SonoEdgeError, match=r"x\.png is not a picture"):
        read_case_picture(junk)
