"""Feeds of frames: video files, pictures, DICOM clips, cameras and RTSP streams, opened by one function."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame

# waiting: connected, but no frame yet; stalled: connected, but no frame any more
SourceState = Literal["waiting", "live", "stalled", "lost", "ended"]

_STREAMS = ("rtsp://", "rtsps://", "http://", "https://")
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
_DICOM = {".dcm", ".dicom", ".ima"}


class Source(Protocol):
    """A feed; iterate it once, from one thread; `close` may be called from another and ends the iteration."""

    name: str
    fps: float
    state: SourceState

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames at the feed's own pace; raises SonoEdgeError when a recorded feed breaks."""
        ...

    def close(self) -> None:
        """End the iteration and release the device or file."""
        ...


def open_source(spec: str, *, once: bool = False, fps: float | None = None) -> Source:
    """Open the feed that `spec` names: a video, picture, folder or DICOM path, a camera ("0", "/dev/video0"), a stream.

    Recorded feeds start again when they end unless `once`; `fps` replaces the feed's own rate. Raises SonoEdgeError
    when there is nothing to play.
    """
    if fps is not None and not 0 < fps <= 1000:
        raise SonoEdgeError(f"the frame rate {fps} is not between 0 and 1000 frames a second: give another --fps")
    if spec.startswith(_STREAMS) or spec.isdecimal() or spec.startswith("/dev/"):
        from sonoedge.runtime.sources.live import LiveSource

        return LiveSource(spec, once=once, fps=fps)
    if "://" in spec:
        raise SonoEdgeError(
            f"the source {spec} has an unknown scheme: give a path, a camera number, a /dev/video device "
            f"or one of {' '.join(_STREAMS)}"
        )
    path = Path(spec)
    if not path.exists():
        raise SonoEdgeError(f"the source {spec} does not exist: name a video, a picture, a folder or a clip")
    if path.is_dir():
        from sonoedge.runtime.sources.pictures import PictureSource

        found = [p for p in path.iterdir() if p.suffix.lower() in _PICTURES and not p.name.startswith(".")]
        if not found:
            raise SonoEdgeError(f"the folder {spec} holds no picture: put files ending in .png or .jpg there")
        return PictureSource(spec, found, once=once, fps=fps)
    if path.suffix.lower() in _DICOM or _has_dicom_magic(path):
        from sonoedge.runtime.sources.dicom import DicomSource

        return DicomSource(path, once=once, fps=fps)
    if path.suffix.lower() in _PICTURES:
        from sonoedge.runtime.sources.pictures import PictureSource

        return PictureSource(spec, [path], once=once, fps=fps)
    from sonoedge.runtime.sources.video import VideoSource

    return VideoSource(path, once=once, fps=fps)


def _has_dicom_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise SonoEdgeError(f"the source {path} cannot be read ({error}): check its permissions") from error
