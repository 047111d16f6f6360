"""Feeds of frames: recordings, cameras, RTSP, GStreamer, OpenIGTLink and pushed frames, opened by one function."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Protocol

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.frame import Frame

# waiting: no frame yet; stalled: connected but no frames for a while; lost: to be connected again; ended: for good
SourceState = Literal["waiting", "live", "stalled", "lost", "ended"]

_STREAMS = ("rtsp://", "rtsps://", "http://", "https://")
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
_DICOM = {".dcm", ".dicom", ".ima"}
FASTEST = 100.0  # times the recorded rate


class Source(Protocol):
    """A feed; iterate it once, from one thread; `close` may be called from another and ends the iteration."""

    name: str
    fps: float

    @property
    def state(self) -> SourceState:
        """What the feed is doing now."""
        ...

    @property
    def detail(self) -> str | None:
        """More about it in words, such as "connected but no frames for 2.1 s"; None when there is nothing to add."""
        ...

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames at the feed's own pace; raises SonoEdgeError when a recorded feed breaks."""
        ...

    def close(self) -> None:
        """End the iteration and release the device or file."""
        ...


def open_source(
    spec: str, *, once: bool = False, fps: float | None = None, speed: float = 1.0, step: bool = False
) -> Source:
    """Open the feed that `spec` names: a path, or one of the live feeds that `_open_live` knows.

    Recorded feeds start again when they end unless `once`; `fps` replaces the feed's own rate, `speed` multiplies it,
    and with `step` a frame comes whenever it is asked for. Raises SonoEdgeError when there is nothing to play.
    """
    if fps is not None and not 0 < fps <= 1000:
        raise SonoEdgeError(f"the frame rate {fps} is not between 0 and 1000 frames a second: give another --fps")
    if not 0 < speed <= FASTEST:
        raise SonoEdgeError(f"the speed {speed} is not between 0 and {FASTEST:g} times the recorded one: give another")
    if "://" in spec or spec.startswith(("/dev/", "gst:")) or spec.isdecimal():
        if speed != 1 or step:
            raise SonoEdgeError(f"the source {spec} is live, so it sets its own pace: leave out --speed and --step")
        return _open_live(spec, once, fps)
    return _open_recorded(spec, once, fps, speed, step)


def _open_live(spec: str, once: bool, fps: float | None) -> Source:
    """A camera number or /dev/video0, an RTSP or HTTP stream, gst:, igtl:// or ipc://."""
    if spec.startswith("gst:"):
        from sonoedge.runtime.sources.gstreamer import GStreamerSource

        return GStreamerSource(spec, once=once, fps=fps)
    if spec.startswith("igtl://"):
        from sonoedge.runtime.sources.openigtlink import OpenIGTLinkSource

        return OpenIGTLinkSource(spec, once=once, fps=fps)
    if spec.startswith("ipc://"):
        from sonoedge.runtime.sources.pushed import PushedSource

        return PushedSource(spec, once=once, fps=fps)
    if "://" in spec and not spec.startswith(_STREAMS):
        raise SonoEdgeError(
            f"the source {spec} has an unknown scheme: give a path, a camera number, a /dev/video device, `gst: …` "
            f"or one of {' '.join((*_STREAMS, 'igtl://', 'ipc://'))}"
        )
    from sonoedge.runtime.sources.live import LiveSource

    return LiveSource(spec, once=once, fps=fps)


def _open_recorded(spec: str, once: bool, fps: float | None, speed: float, step: bool) -> Source:
    path = Path(spec)
    if not path.exists():
        raise SonoEdgeError(f"the source {spec} does not exist: name a video, a picture, a folder or a clip")
    from sonoedge.runtime.sources.pace import Pace

    pace = Pace(once=once, fps=fps, speed=speed, step=step)
    if path.is_dir():
        from sonoedge.runtime.sources.pictures import PictureSource

        found = [p for p in path.iterdir() if p.suffix.lower() in _PICTURES and not p.name.startswith(".")]
        if not found:
            raise SonoEdgeError(f"the folder {spec} holds no picture: put files ending in .png or .jpg there")
        return PictureSource(spec, found, pace)
    if path.suffix.lower() in _DICOM or _has_dicom_magic(path):
        from sonoedge.runtime.sources.dicom import DicomSource

        return DicomSource(path, pace)
    if path.suffix.lower() in _PICTURES:
        from sonoedge.runtime.sources.pictures import PictureSource

        return PictureSource(spec, [path], pace)
    from sonoedge.runtime.sources.video import VideoSource

    return VideoSource(path, pace)


def _has_dicom_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError as error:
        raise SonoEdgeError(f"the source {path} cannot be read ({error}): check its permissions") from error
