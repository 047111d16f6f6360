"""The picture behind a path that a case names: a picture file, or a DICOM file of which the sector alone is seen.

Nothing of a DICOM file but its pixels inside the ultrasound region, and whether text is burned into them, is used: no
tag of a patient is read.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import InvalidDicomError

from sonoedge.calibration.frames import is_dicom
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.preprocess import crop_to_sector
from sonoedge.runtime.sources.dicom import DicomSource
from sonoedge.runtime.sources.pace import Pace
from sonoedge.runtime.sources.pictures import read_picture


def read_case_picture(path: Path) -> npt.NDArray[np.uint8]:
    """The picture as RGB [height, width, 3]; of a DICOM clip the middle frame, cropped to its ultrasound region.

    Raises SonoEdgeError naming a file that cannot be read, and a DICOM file that names no ultrasound region without
    saying that no text is burned in: names of patients are often written beside the sector.
    """
    if not is_dicom(path):
        return read_picture(path)
    source = DicomSource(path, Pace(once=True))
    if source.sector is None and not _without_text(path):
        raise SonoEdgeError(
            f"{path} names no two-dimensional ultrasound region, so text beside the sector cannot be cut away: export "
            "it with its regions, or as a picture of the sector alone"
        )
    readable = sum(picture is not None for picture in source.pictures())
    whole = (picture for picture in source.pictures() if picture is not None)  # a long clip is not held in memory
    middle = next(islice(whole, readable // 2, None))
    return crop_to_sector(Frame(middle, readable // 2, 0, source.spacing_mm, source.name, source.sector))


def _without_text(path: Path) -> bool:
    """Whether the file vouches that no text is burned into its pixels. Source: DICOM PS3.3 C.7.6.1.1."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["BurnedInAnnotation"])
    except (InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise SonoEdgeError(f"{path} is not a DICOM file ({error}): remove it, or replace it") from error
    return str(header.get("BurnedInAnnotation", "")).upper() == "NO"
