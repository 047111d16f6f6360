"""Reads a DICOM file that may be anything, and refuses what is no ultrasound clip before a pixel is decoded."""

import logging
import math
import warnings
from pathlib import Path

import msgspec
import numpy as np
import pydicom
from pydicom.filereader import read_file_meta_info
from pydicom.uid import DeflatedExplicitVRLittleEndian

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources.pictures import DEFAULT_FPS
from sonoedge.runtime.sources.regions import Region, find_region

MAX_FILE_BYTES = 2**30
MAX_PIXELS = 2**26  # of a frame
MAX_FRAMES = 100_000
ULTRASOUND = ("US", "IVUS")
UNSAID = ("", "OT")  # of pictures of a screen, and of files that were converted


class Clip(msgspec.Struct, frozen=True):
    """A clip's data set, with what had to be checked in it."""

    dataset: pydicom.Dataset
    frames: int
    frame_bytes: int  # of a frame as RGB
    fps: float
    region: Region | None


def read_clip(path: Path) -> Clip:
    """Read a DICOM file; raises SonoEdgeError when it is none, is too large or says that it is no ultrasound."""
    logging.getLogger("pydicom").setLevel(logging.ERROR)  # what it warns of is mended, or told as one sentence
    try:
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise SonoEdgeError(
                f"{path} has {size / 1e9:.1f} GB, more than {MAX_FILE_BYTES / 1e9:.1f}: export a shorter clip"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns a second way
            return _check(path, _read(path))
    except SonoEdgeError:
        raise
    except Exception as error:  # a parser that is given any bytes, and values converted when they are looked at
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise SonoEdgeError(f"{path} is not a DICOM file ({told}): give a DICOM clip with preamble") from error


def _read(path: Path) -> pydicom.Dataset:
    if read_file_meta_info(path).get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise SonoEdgeError(  # a small file could become any number of bytes
            f"{path} is deflated, which clips are not: export it uncompressed, as RLE, JPEG or JPEG 2000"
        )
    return pydicom.dcmread(path)


def _check(path: Path, dataset: pydicom.Dataset) -> Clip:
    modality = str(dataset.get("Modality") or "")
    if modality not in ULTRASOUND + UNSAID:
        raise SonoEdgeError(f"{path} is of the modality {modality[:16]}, not ultrasound: give a clip that says US")
    if "PixelData" not in dataset or "Rows" not in dataset or "Columns" not in dataset:
        raise SonoEdgeError(f"{path} has no pixels: give an ultrasound image or clip, not a report")
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    stated = dataset.get("NumberOfFrames")
    frames = 1 if stated is None or stated == "" else int(stated)
    if rows < 1 or columns < 1 or rows * columns > MAX_PIXELS:
        raise SonoEdgeError(f"{path} has frames of {columns} x {rows} pixels: give a clip with smaller ones")
    if not 1 <= frames <= MAX_FRAMES:
        raise SonoEdgeError(f"{path} says it has {frames} frames, not 1 to {MAX_FRAMES}: export the clip again")
    return Clip(dataset, frames, rows * columns * 3, _frame_rate(dataset), find_region(dataset, rows, columns))


def _frame_rate(dataset: pydicom.Dataset) -> float:
    """Frames a second as the file states it; a single picture and a clip that states none play at the default."""
    gaps_ms = [float(gap) for gap in np.atleast_1d(dataset.get("FrameTimeVector") or [])[1:]]  # the first is 0
    frame_ms = float(dataset.get("FrameTime") or 0) or (sum(gaps_ms) / len(gaps_ms) if gaps_ms else 0)
    for fps in (
        float(dataset.get("CineRate") or 0),
        1000 / frame_ms if frame_ms else 0,
        float(dataset.get("RecommendedDisplayFrameRate") or 0),
    ):
        if math.isfinite(fps) and 0 < fps <= 1000:
            return fps
    return DEFAULT_FPS
