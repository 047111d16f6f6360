"""A pool of phantom frames at model resolution, rendered once by several processes and read from disk afterwards."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import KINDS, Truth, phantom
from sonoedge.errors import SonoEdgeError
from sonoedge.progress import track
from sonoedge.runtime.preprocess import ImageSpec, Patches, preprocess, resized, smart_resize

CHUNK = 250  # frames in one file
RENDERED_PX = 224  # width and height of a phantom before it is resized for the model


class LabelledFrame(msgspec.Struct, frozen=True):
    """One frame of a pool: grey pixels uint8 [S, S], lesion classes uint8 [G, G] a patch, and the truth they show."""

    grey: npt.NDArray[np.uint8]
    lesion_classes: npt.NDArray[np.uint8]
    truth: Truth

    def rgb(self) -> npt.NDArray[np.uint8]:
        """The picture [S, S, 3], three equal channels."""
        return np.repeat(self.grey[..., None], 3, axis=2)

    def patches(self, spec: ImageSpec) -> Patches:
        """The frame as the model sees it: float32 [patches, 1176]."""
        return preprocess(self.rgb(), spec)


class PhantomPool:
    """Frames of consecutive seeds: `pool[i]` shows seed `first_seed + i`."""

    def __init__(
        self,
        first_seed: int,
        greys: npt.NDArray[np.uint8],
        classes: npt.NDArray[np.uint8],
        truths: Sequence[Truth],
    ) -> None:
        self.first_seed = first_seed
        self.greys = greys  # [frames, S, S]
        self.classes = classes  # [frames, G, G]
        self.truths = truths

    def __len__(self) -> int:
        return len(self.truths)

    def __getitem__(self, index: int) -> LabelledFrame:
        return LabelledFrame(self.greys[index], self.classes[index], self.truths[index])

    def mirrored(self, index: int) -> LabelledFrame:
        """The frame as a probe turned by 180 degrees shows it: the pixels and the lesion's side change together."""
        return mirror(self[index])


def lesion_class(truth: Truth) -> int:
    """0 without a lesion, else 1 + 2·kind + (1 on the right): what a patch inside the lesion is labelled."""
    if truth.lesion is None:
        return 0
    return 1 + 2 * KINDS.index(truth.lesion.kind) + (truth.lesion.side == "right")


LESION_CLASSES = 1 + 2 * len(KINDS)


def mirror(frame: LabelledFrame) -> LabelledFrame:
    """Turn a frame left to right, truth included."""
    lesion = frame.truth.lesion
    if lesion is not None:
        x, y = lesion.centre_px
        lesion = msgspec.structs.replace(
            lesion, side="left" if lesion.side == "right" else "right", centre_px=(frame.truth.size - 1 - x, y)
        )
    truth = msgspec.structs.replace(frame.truth, lesion=lesion)
    classes = np.where(frame.lesion_classes[:, ::-1] > 0, lesion_class(truth), 0).astype(np.uint8)
    return LabelledFrame(np.ascontiguousarray(frame.grey[:, ::-1]), classes, truth)


def render(seed: int, spec: ImageSpec, region: str | None = None) -> LabelledFrame:
    """Render one phantom (of `region`, if given) and bring it to the model's resolution with the runtime's resize."""
    frame = phantom(seed, size=RENDERED_PX, region=region)
    grey = np.ascontiguousarray(resized(frame.image, spec)[..., 0])  # [S, S]
    grid = (grey.shape[1] // spec.patch_size, grey.shape[0] // spec.patch_size)
    cover = cv2.resize(frame.lesion_mask.astype(np.float32), grid, interpolation=cv2.INTER_AREA)  # [G, G]
    # A patch belongs to the lesion when a third of it does; the best covered patch always does.
    inside = (cover >= 0.33) | ((cover == cover.max()) & (cover > 0))
    classes = np.where(inside, lesion_class(frame.truth), 0).astype(np.uint8)
    return LabelledFrame(grey, classes, frame.truth)


def phantom_pool(
    folder: Path,
    frames: int,
    *,
    first_seed: int,
    spec: ImageSpec,
    region: str | None = None,
    label: str = "render phantoms",
    workers: int = 0,
) -> PhantomPool:
    """Render `frames` phantoms from `first_seed` on into `folder`; chunks there are kept, so a killed run resumes.

    region: what all of them show (None: as their seeds say). Raises SonoEdgeError when `frames` is not positive, and
    for a chunk of another resolution or that is damaged.
    """
    if frames <= 0:
        raise SonoEdgeError(f"frames = {frames}: a pool needs at least one phantom frame")
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(first_seed, first_seed + frames, CHUNK)
    jobs = [(folder, start, min(CHUNK, first_seed + frames - start), region, spec) for start in starts]
    missing = [job for job in jobs if not _chunk_path(*job[:4]).exists()]
    # Fresh processes: forking one that already runs OpenMP threads can deadlock.
    processes = ProcessPoolExecutor(workers or os.cpu_count() or 1, mp_context=get_context("spawn"))
    with track(label, frames) as advance, processes:
        advance(frames - sum(job[2] for job in missing))
        for rendered in processes.map(_render_chunk, missing):
            advance(rendered)
    chunks = [_read_chunk(_chunk_path(*job[:4]), spec) for job in jobs]
    return PhantomPool(
        first_seed,
        np.concatenate([chunk[0] for chunk in chunks]),
        np.concatenate([chunk[1] for chunk in chunks]),
        [truth for chunk in chunks for truth in chunk[2]],
    )


def _chunk_path(folder: Path, start: int, frames: int, region: str | None) -> Path:
    return folder / f"phantoms-{start}-{frames}{'' if region is None else f'-{region}'}.npz"


def _render_chunk(job: tuple[Path, int, int, str | None, ImageSpec]) -> int:
    folder, start, frames, region, spec = job
    path = _chunk_path(folder, start, frames, region)
    cv2.setNumThreads(1)
    rendered = [render(seed, spec, region) for seed in range(start, start + frames)]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            grey=np.stack([frame.grey for frame in rendered]),
            classes=np.stack([frame.lesion_classes for frame in rendered]),
            truths=np.frombuffer(msgspec.msgpack.encode([frame.truth for frame in rendered]), np.uint8),
        )
    temporary.rename(path)
    return frames


def _read_chunk(path: Path, spec: ImageSpec) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], list[Truth]]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            truths = msgspec.msgpack.decode(data["truths"].tobytes(), type=list[Truth])
            greys, classes = data["grey"], data["classes"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error, msgspec.DecodeError) as error:
        raise SonoEdgeError(f"{path} is damaged ({error}): remove it, so that it is rendered again") from error
    size = smart_resize(RENDERED_PX, RENDERED_PX, spec)
    if greys.shape[1:] != size:
        raise SonoEdgeError(
            f"{path} holds frames of {greys.shape[1:]} pixels and the model reads {size}: remove it, or "
            "choose another folder"
        )
    return greys, classes, truths
