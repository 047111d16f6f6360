"""A DICOM ultrasound clip or picture: pixels as RGB, the ultrasound region, the pixel spacing and the frame rate."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, iter_pixels

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources.pictures import DEFAULT_FPS
from sonoedge.runtime.sources.recorded import RecordedSource
from sonoedge.runtime.sources.regions import find_region

KEEP_BYTES = 256 * 2**20  # clips up to this size are decoded once: a JPEG frame costs 5 ms, which the model needs


class DicomSource(RecordedSource):
    """The frames of a DICOM file, at its own rate when it states one."""

    def __init__(self, path: Path, *, once: bool, fps: float | None) -> None:
        """Decode the clip; raises SonoEdgeError when it is not DICOM, has no pixels or cannot be decoded."""
        try:
            self._dataset = pydicom.dcmread(path)
        except (InvalidDicomError, OSError, EOFError, ValueError) as error:
            raise SonoEdgeError(f"{path} is not a DICOM file ({error}): give a DICOM clip with preamble") from error
        if "PixelData" not in self._dataset:
            raise SonoEdgeError(f"{path} has no pixels: give an ultrasound image or clip, not a report")
        super().__init__(str(path), once=once, fps=fps or _frame_rate(self._dataset))
        rows, columns = int(self._dataset.Rows), int(self._dataset.Columns)
        count = int(self._dataset.get("NumberOfFrames") or 1)
        decoded = self._decode()
        first = next(decoded, None)
        if first is None:
            raise SonoEdgeError(f"{path} has no frames: export the clip from the scanner again")
        self._kept = [first, *decoded] if rows * columns * 3 * count <= KEEP_BYTES else None
        region = find_region(self._dataset, rows, columns)
        if region is not None:
            self.sector, self.spacing_mm = region.sector, region.spacing_mm

    def pictures(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield the clip's frames."""
        yield from self._kept if self._kept is not None else self._decode()

    def _decode(self) -> Iterator[npt.NDArray[np.uint8]]:
        try:
            for pixels in iter_pixels(self._dataset):  # YBR becomes RGB here
                yield _to_rgb(pixels, self._dataset)
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, ValueError) as error:
            syntax = self._dataset.file_meta.get("TransferSyntaxUID", "none")
            raise SonoEdgeError(
                f"the pixels of {self.name} cannot be decoded (transfer syntax {getattr(syntax, 'name', syntax)}: "
                f"{str(error).splitlines()[0]}): export the clip uncompressed or as JPEG"
            ) from error


def _to_rgb(pixels: npt.NDArray[np.generic], dataset: pydicom.Dataset) -> npt.NDArray[np.uint8]:
    """Bring one decoded frame ([rows, columns] or [rows, columns, 3], any depth) to RGB uint8."""
    interpretation = str(dataset.PhotometricInterpretation)
    bits = int(dataset.BitsStored)
    if interpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        bits = pixels.dtype.itemsize * 8
    wide = pixels.astype(np.int64)
    if int(dataset.get("PixelRepresentation", 0)) == 1 and pixels.ndim == 2:
        wide += 1 << (bits - 1)
    values = (wide >> (bits - 8) if bits > 8 else wide << (8 - bits)).astype(np.uint8)
    if interpretation == "MONOCHROME1":
        values = 255 - values
    return np.repeat(values[:, :, None], 3, axis=2) if values.ndim == 2 else np.ascontiguousarray(values)


def _frame_rate(dataset: pydicom.Dataset) -> float:
    """Frames a second as the file states it; a single picture and a clip that states none play at the default."""
    if cine := float(dataset.get("CineRate") or 0):
        return cine
    if frame_ms := float(dataset.get("FrameTime") or 0):
        return 1000 / frame_ms
    return float(dataset.get("RecommendedDisplayFrameRate") or DEFAULT_FPS)
