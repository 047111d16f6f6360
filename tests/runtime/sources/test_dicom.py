"""DICOM clips: each way that scanners pack pixels and colours, what is damaged or hostile, and rates in a vector."""

import io
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pydicom.data
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import convert_color_space
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
    UltrasoundMultiFrameImageStorage,
)

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.sources import open_source

Pixels = npt.NDArray[np.uint8]
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (128, 128, 128))  # a frame each


def colour_clip() -> Pixels:
    """Four frames, each of one colour: [4, 32, 48, 3]."""
    return np.array([np.full((32, 48, 3), colour, np.uint8) for colour in COLOURS])


def write_clip(
    path: Path, pixels: Pixels, interpretation: str, syntax: UID = ExplicitVRLittleEndian, data: bytes | None = None
) -> Path:
    """Write a clip [frames, rows, columns(, 3)]; `data` replaces the bytes of its pixels."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.NumberOfFrames, dataset.Rows, dataset.Columns = pixels.shape[:3]
    dataset.SamplesPerPixel = 3 if pixels.ndim == 4 else 1
    if pixels.ndim == 4:
        dataset.PlanarConfiguration = 0
    dataset.PhotometricInterpretation = interpretation
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelRepresentation, dataset.CineRate = 7, 0, 50
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dataset.PixelData = pixels.tobytes() if data is None else data
    if syntax.is_compressed:
        dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path, enforce_file_format=True)
    return path


def packed(pixels: Pixels, kind: str, **options: object) -> bytes:
    """Encode every frame with Pillow."""
    frames = []
    for frame in pixels:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, kind, **options)
        frames.append(file.getvalue())
    return encapsulate(frames)


def rle(path: Path) -> Path:
    write_clip(path, colour_clip(), "RGB")
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    return path


def rle_ybr(path: Path) -> Path:
    ybr = np.array([convert_color_space(frame, "RGB", "YBR_FULL") for frame in colour_clip()])
    write_clip(path, ybr, "YBR_FULL")
    dataset = pydicom.dcmread(path)
    dataset.compress(RLELossless)
    dataset.save_as(path)
    return path


def ybr_422_bytes(pixels: Pixels) -> bytes:
    """Pack as YBR_FULL_422: two luminances, then the chroma that both share."""
    ybr = np.array([convert_color_space(frame, "RGB", "YBR_FULL") for frame in pixels])
    left, right = ybr[:, :, 0::2], ybr[:, :, 1::2]
    return np.stack([left[..., 0], right[..., 0], left[..., 1], left[..., 2]], axis=-1).tobytes()


PACKINGS: dict[str, Callable[[Path], Path]] = {
    "rle": rle,
    "rle, ybr": rle_ybr,
    "jpeg, ybr 422": lambda path: write_clip(
        path, colour_clip(), "YBR_FULL_422", JPEGBaseline8Bit, packed(colour_clip(), "JPEG", quality=95)
    ),
    "jpeg, ybr full": lambda path: write_clip(
        path, colour_clip(), "YBR_FULL", JPEGBaseline8Bit, packed(colour_clip(), "JPEG", quality=95, subsampling=0)
    ),
    "jpeg 2000 lossless": lambda path: write_clip(
        path, colour_clip(), "YBR_RCT", JPEG2000Lossless, packed(colour_clip(), "JPEG2000", no_jp2=True, mct=1)
    ),
    "jpeg 2000": lambda path: write_clip(
        path,
        colour_clip(),
        "YBR_ICT",
        JPEG2000,
        packed(colour_clip(), "JPEG2000", no_jp2=True, mct=1, irreversible=True),
    ),
    "raw, ybr full": lambda path: write_clip(
        path, np.array([convert_color_space(frame, "RGB", "YBR_FULL") for frame in colour_clip()]), "YBR_FULL"
    ),
    "raw, ybr 422": lambda path: write_clip(path, colour_clip(), "YBR_FULL_422", data=ybr_422_bytes(colour_clip())),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_colours_that_went_in(tmp_path: Path, packing: str) -> None:
    source = open_source(str(PACKINGS[packing](tmp_path / "a.dcm")), once=True)
    taken = list(source)
    assert source.detail is None
    worst = 0
    for frame, colour in zip(taken, COLOURS, strict=True):
        assert frame.image.shape == (32, 48, 3)
        worst = max(worst, int(np.abs(frame.image.astype(int) - colour).max()))
    print(f"{packing}: largest error {worst} of 255")
    assert worst <= 3


# pydicom's own files, written by dcmtk, GDCM and scanners.
FOREIGN = (
    "examples_jpeg2k.dcm",  # YBR_RCT
    "examples_rgb_color.dcm",
    "examples_ybr_color.dcm",  # 30 frames of YBR_FULL_422 as JPEG
    "ExplVR_BigEnd.dcm",
    "SC_rgb_dcmtk_+eb+cr.dcm",  # JPEG of RGB
    "SC_rgb_dcmtk_+eb+cy+n1.dcm",  # JPEG of YBR_FULL
    "SC_rgb_dcmtk_+eb+cy+np.dcm",  # JPEG of YBR_FULL_422
    "SC_rgb_dcmtk_+eb+cy+s4.dcm",
    "SC_rgb_gdcm_KY.dcm",  # JPEG 2000 of RGB
    "SC_rgb_rle_2frame.dcm",
    "SC_rgb_rle_16bit_2frame.dcm",
    "SC_ybr_full_422_uncompressed.dcm",
)


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.filterwarnings("default::UserWarning")
def test_foreign_files_give_what_pydicom_gives_for_the_whole_clip(name: str) -> None:
    path = str(pydicom.data.get_testdata_file(name, download=False))
    source = open_source(path, once=True, step=True)
    taken = np.array([frame.image for frame in source])
    assert source.detail is None
    whole = pydicom.dcmread(path).pixel_array  # decoded in one go, YBR turned to RGB
    whole = whole if whole.ndim == 4 else whole[None]
    np.testing.assert_array_equal(taken, whole >> (8 * whole.dtype.itemsize - 8))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("CT_small.dcm", "of the modality CT, not ultrasound"),
        ("MR_small_RLE.dcm", "of the modality MR, not ultrasound"),
        ("rtdose.dcm", "of the modality RTDOSE"),
        ("badVR.dcm", "of the modality RTDOSE"),
        ("test-SR.dcm", "of the modality SR"),
        ("image_dfl.dcm", "is deflated"),
        ("priv_SQ.dcm", "has no pixels"),
    ],
)
def test_what_is_no_ultrasound_is_refused(name: str, told: str) -> None:
    with pytest.raises(SonoEdgeError, match=told) as refusal:
        open_source(str(pydicom.data.get_testdata_file(name, download=False)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("tag", "value", "told"),
    [
        ("Rows", 0, "48 x 0 pixels"),
        ("Rows", 65535, "cannot be decoded"),  # more than the file has
        ("Columns", None, "has no pixels"),
        ("NumberOfFrames", "0", "says it has 0 frames"),
        ("NumberOfFrames", "-3", "says it has -3 frames"),
        ("NumberOfFrames", "2000000000", "says it has 2000000000 frames"),
        ("NumberOfFrames", "99999", "cannot be decoded"),
        ("BitsAllocated", 7, "cannot be decoded"),
        ("SamplesPerPixel", 9, "cannot be decoded"),
        ("PhotometricInterpretation", "NONE SUCH", "cannot be decoded"),
        ("PixelData", b"", "cannot be decoded"),
    ],
)
@pytest.mark.filterwarnings("default::UserWarning")
def test_absurd_numbers_are_refused_in_one_sentence(tmp_path: Path, tag: str, value: object, told: str) -> None:
    path = write_clip(tmp_path / "a.dcm", colour_clip(), "RGB")
    dataset = pydicom.dcmread(path)
    if value is None:
        del dataset[tag]
    else:
        setattr(dataset, tag, value)
    dataset.save_as(path)
    began = time.monotonic()
    with pytest.raises(SonoEdgeError, match=told) as refusal:
        open_source(str(path))
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - began < 10


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "a.dcm", colour_clip(), "YBR_FULL_422", JPEGBaseline8Bit, packed(colour_clip(), "JPEG")
    )
    dataset = pydicom.dcmread(path)
    dataset.Rows = dataset.Columns = 65535
    dataset.save_as(path)
    with pytest.raises(SonoEdgeError, match="65535 x 65535 pixels"):
        open_source(str(path))


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.dcm", colour_clip(), "RGB")
    with path.open("r+b") as file:
        file.truncate(3 * 2**30)  # takes no room on the disk
    with pytest.raises(SonoEdgeError, match=r"3\.2 GB, more than 1\.1"):
        open_source(str(path))


@pytest.mark.parametrize(
    "tags", [{"CineRate": "-5"}, {"FrameTime": "-20"}, {"FrameTime": "1e-9"}, {"CineRate": "1000000"}]
)
@pytest.mark.filterwarnings("default::UserWarning")
def test_a_rate_that_cannot_be_is_none(tmp_path: Path, tags: dict[str, str]) -> None:
    dataset = pydicom.dcmread(write_clip(tmp_path / "a.dcm", colour_clip(), "RGB"))
    del dataset.CineRate
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(tmp_path / "a.dcm")
    assert open_source(str(tmp_path / "a.dcm")).fps == 10


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_frames_or_one_sentence(tmp_path: Path, clip: Path) -> None:
    """The header of the real clip, changed at random: nothing but SonoEdgeError may come out."""
    whole, random = clip.read_bytes(), np.random.default_rng(0)
    refusals = []
    for number in range(60):
        damaged = bytearray(whole)
        for place in random.integers(132, 4000, 12):
            damaged[place] = random.integers(256)
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(damaged if number % 3 else damaged[: random.integers(132, len(damaged))])
        try:
            source = open_source(str(path), once=True, step=True)
            assert all(frame.image.ndim == 3 for frame in itertools.islice(source, 2))
        except SonoEdgeError as error:
            refusals.append(str(error))
    assert len(refusals) > 5
    assert not any("\n" in refusal for refusal in refusals)


def test_a_damaged_frame_is_left_out_and_named_and_keeps_its_time(tmp_path: Path) -> None:
    frames = []
    for colour in COLOURS:
        file = io.BytesIO()
        Image.new("RGB", (48, 32), colour).save(file, "JPEG", quality=95)
        frames.append(file.getvalue())
    frames[2] = b"\xff\xd8" + b"\x13" * 60
    path = write_clip(tmp_path / "a.dcm", colour_clip(), "YBR_FULL_422", JPEGBaseline8Bit, encapsulate(frames))
    source = open_source(str(path), once=True)
    taken = list(source)
    shown = np.array([frame.image[0, 0] for frame in taken], int)
    assert np.abs(shown - [COLOURS[number] for number in (0, 1, 3)]).max() <= 3
    assert source.detail is not None
    assert source.detail.startswith("frame 3 of 4 cannot be decoded (")
    assert [frame.sequence for frame in taken] == [0, 1, 2]
    gaps_ms = np.diff([frame.captured_ns for frame in taken]) / 1e6
    assert gaps_ms[1] > 1.5 * 1000 / 50  # two periods, of which the first may have begun late


def test_a_clip_of_which_the_first_frame_is_damaged_plays(tmp_path: Path) -> None:
    frames = [b"\xff\xd8" + b"\x13" * 60]
    file = io.BytesIO()
    Image.new("RGB", (48, 32), COLOURS[1]).save(file, "JPEG")
    path = write_clip(
        tmp_path / "a.dcm", colour_clip()[:2], "YBR_FULL_422", JPEGBaseline8Bit, encapsulate([*frames, file.getvalue()])
    )
    (frame,) = open_source(str(path), once=True)
    assert frame.image[0, 0].tolist() == pytest.approx(COLOURS[1], abs=3)


def test_a_clip_with_no_whole_frame_is_refused(tmp_path: Path) -> None:
    bad = encapsulate([b"\xff\xd8" + b"\x13" * 60] * 4)
    path = write_clip(tmp_path / "a.dcm", colour_clip(), "YBR_FULL_422", JPEGBaseline8Bit, bad)
    with pytest.raises(SonoEdgeError, match=r"JPEG Baseline.*export the clip"):
        open_source(str(path))


def test_a_clip_too_large_to_keep_is_decoded_again_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sonoedge.runtime.sources.dicom.KEEP_BYTES", 0)
    source = open_source(str(rle(tmp_path / "a.dcm")), fps=500)
    shades = [frame.image[0, 0, 0] for frame in itertools.islice(source, 9)]
    assert shades == [200, 40, 40, 128, 200, 40, 40, 128, 200]


def test_a_vector_of_times_gives_the_rate(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(write_clip(tmp_path / "a.dcm", colour_clip(), "RGB"))
    del dataset.CineRate
    dataset.FrameTimeVector = [0, 30, 50, 40]
    dataset.save_as(tmp_path / "a.dcm")
    assert open_source(str(tmp_path / "a.dcm")).fps == pytest.approx(25)


def test_replay_is_faster_on_request(tmp_path: Path) -> None:
    path = str(write_clip(tmp_path / "a.dcm", colour_clip(), "RGB"))
    assert open_source(path).fps == 50
    source = open_source(path, once=True, fps=10, speed=10)
    began = time.monotonic()
    assert len(list(source)) == 4
    assert source.fps == 100
    assert time.monotonic() - began < 0.3  # at 10 frames a second, it takes that
