"""A DICOM ultrasound clip or picture: pixels as RGB, the ultrasound region, the pixel spacing and the frame rate."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.pixels import apply_color_lut, pixel_array

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources.dicom_file import read_clip
from sonoedge.runtime.sources.pace import Pace
from sonoedge.runtime.sources.recorded import RecordedSource

KEEP_BYTES = 256 * 2**20  # clips up to this size are decoded once: a JPEG frame costs 5 ms, which the model needs
HOPELESS = 100  # frames that cannot be decoded, from the start of a clip: the rest is not tried


class DicomSource(RecordedSource):
    """The frames of a DICOM file, at its own rate when it states one."""

    def __init__(self, path: Path, pace: Pace) -> None:
        """Decode the clip; raises SonoEdgeError when it is no DICOM clip of ultrasound or cannot be decoded."""
        clip = read_clip(path)
        super().__init__(str(path), pace, fps=clip.fps)
        self._dataset, self._count = clip.dataset, clip.frames
        self.still = clip.frames == 1
        self._kept: list[npt.NDArray[np.uint8] | None] | None = None
        if clip.region is not None:
            self.sector, self.spacing_mm = clip.region.sector, clip.region.spacing_mm
        if clip.frame_bytes * clip.frames <= KEEP_BYTES:
            self._kept = list(self._decode())
            del self._dataset.PixelData
        else:  # a clip of which nothing can be decoded is refused now
            next(picture for picture in self._decode() if picture is not None)

    def pictures(self) -> Iterator[npt.NDArray[np.uint8] | None]:
        """Yield the clip's frames, None for one that cannot be decoded."""
        yield from self._kept if self._kept is not None else self._decode()

    def _decode(self) -> Iterator[npt.NDArray[np.uint8] | None]:
        """Go on behind a frame that is damaged; raises SonoEdgeError when there is no other."""
        damaged = 0
        for index in range(self._count):
            picture, error = self._decode_one(index)
            if error is not None:
                damaged += 1
                told = (str(error).splitlines() or [type(error).__name__])[0]
                self._note = f"frame {index + 1} of {self._count} cannot be decoded ({told}): left out"
                if damaged == index + 1 and damaged in (self._count, HOPELESS):
                    syntax = self._dataset.file_meta.get("TransferSyntaxUID", "none")
                    raise SonoEdgeError(
                        f"the pixels of {self.name} cannot be decoded (transfer syntax "
                        f"{getattr(syntax, 'name', syntax)}: {told}): export the clip uncompressed or as JPEG"
                    ) from error
            yield picture

    def _decode_one(self, index: int) -> tuple[npt.NDArray[np.uint8] | None, Exception | None]:
        try:
            # pydicom's iter_pixels takes wrong offsets for uncompressed YBR_FULL_422.
            return _to_rgb(pixel_array(self._dataset, index=index), self._dataset), None  # YBR becomes RGB here
        except Exception as error:  # noqa: BLE001 (decoders that are given any bytes)
            return None, error


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
