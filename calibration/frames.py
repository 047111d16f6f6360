"""Frames without questions: pictures of a folder and frames of DICOM clips, cropped to their ultrasound region."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import InvalidDicomError

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.preprocess import crop_to_sector
from sonoedge.runtime.sources.dicom import DicomSource
from sonoedge.runtime.sources.pace import Pace
from sonoedge.runtime.sources.pictures import read_picture

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
DICOM = (".dcm", ".dicom", ".ima")
INDEX = "DICOMDIR"  # lists the files of a DICOM medium; has no pixels itself
CLIP_FRAMES = 32  # of one clip at most: neighbours are nearly alike

Picture = npt.NDArray[np.uint8]


class _Place(msgspec.Struct, frozen=True):
    """Where one frame is: a picture file, or the n-th of the frames of a clip that are used."""

    path: Path
    taken: int | None


class Frames:
    """Frames that can be drawn by index, in the natural order of their files; the clip read last stays in memory."""

    def __init__(self, path: Path) -> None:
        """Find the frames of a picture, a DICOM file or a folder of them and its subfolders.

        At most 32 frames of a clip, evenly spaced, are used. Files of other kinds and DICOM objects without pixels in
        a folder are passed over. Raises SonoEdgeError when no frame is found, and naming a DICOM file that is damaged.
        """
        if not path.exists():
            raise SonoEdgeError(
                f"the data {path} does not exist: name a conversation file (.json), a picture, a DICOM file or a folder"
            )
        files = sorted(visible_files(path), key=natural_order) if path.is_dir() else [path]
        self._clip_lengths = {file: length for file in files if is_dicom(file) and (length := _clip_length(file))}
        self._places = [place for file in files for place in self._places_in(file)]
        self._clip: tuple[Path, tuple[Picture, ...]] | None = None
        if not self._places:
            raise SonoEdgeError(
                f"the data {path} holds no frame: put pictures ({' '.join(PICTURES)}) or DICOM files there"
            )

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the frames are in."""
        return tuple(dict.fromkeys(place.path for place in self._places))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Picture:
        """Frame `index` as RGB [height, width, 3]; raises SonoEdgeError naming a file that cannot be read."""
        place = self._places[index]
        if place.taken is None:
            return read_picture(place.path)
        if self._clip is None or self._clip[0] != place.path:
            self._clip = (place.path, _read_clip(place.path, self._clip_lengths[place.path]))
        return self._clip[1][place.taken]

    def name(self, index: int) -> str:
        """What messages call frame `index`."""
        place = self._places[index]
        return str(place.path) if place.taken is None else f"{place.path} frame {place.taken + 1}"

    def _places_in(self, file: Path) -> Iterator[_Place]:
        if file in self._clip_lengths:
            yield from (_Place(file, taken) for taken in range(min(CLIP_FRAMES, self._clip_lengths[file])))
        elif file.suffix.lower() in PICTURES:
            yield _Place(file, None)


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file below `folder` that is not hidden."""
    for path in folder.rglob("*"):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def is_dicom(path: Path) -> bool:
    """Scanners often write files without an ending, so what a file begins with counts too."""
    if path.suffix.lower() in DICOM:
        return True
    if path.suffix.lower() in PICTURES or path.name == INDEX:
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise SonoEdgeError(f"{path} cannot be read ({error.strerror}): check its permissions") from error


def _clip_length(path: Path) -> int:
    """How many frames the file says it has, 0 for a DICOM object without pixels, such as a report."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except (InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise SonoEdgeError(f"{path} is not a DICOM file ({error}): remove it, or replace it") from error
    return int(header.get("NumberOfFrames") or 1) if "Rows" in header else 0


def _read_clip(path: Path, length: int) -> tuple[Picture, ...]:
    """The evenly spaced frames of a clip of `length` that are used, cropped to its ultrasound region."""
    source = DicomSource(path, Pace(once=True))
    count = min(CLIP_FRAMES, length)
    wanted = {(2 * taken + 1) * length // (2 * count) for taken in range(count)}
    pictures = tuple(
        crop_to_sector(Frame(picture, number, 0, source.spacing_mm, source.name, source.sector))
        for number, picture in enumerate(source.pictures())
        if number in wanted and picture is not None
    )
    if len(pictures) != count:
        raise SonoEdgeError(
            f"{path} says it has {length} frames and fewer can be read: export the clip from the scanner again"
        )
    return pictures


def natural_order(path: Path) -> list[tuple[bool, int, str]]:
    """frame_2 comes before frame_10."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", str(path))
    ]
