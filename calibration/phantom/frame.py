"""One phantom frame: choose what it shows, draw it, form the image, and draw again when its lesion cannot be seen."""

from typing import Literal

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import lesions
from sonoedge.calibration.phantom.anatomy import DEPTH_MM, DRAWERS
from sonoedge.calibration.phantom.canvas import Canvas
from sonoedge.calibration.phantom.geometry import BANK, Geometry, geometry
from sonoedge.calibration.phantom.physics import insonify, scatter
from sonoedge.calibration.phantom.quality import Acquisition, acquisition
from sonoedge.calibration.phantom.truth import KINDS, QUALITIES, REGIONS, UNTRAINED_REGIONS, Lesion, Phantom, Truth
from sonoedge.calibration.phantom.visible import visible
from sonoedge.errors import SonoEdgeError

LESION_SHARE = 0.6
POOR_SHARE = 0.4
MIN_SIZE = 96
_ATTEMPTS = 40

Kind = str | Literal["none"] | None


class Scene(msgspec.Struct, frozen=True, eq=False):
    """Tissue and probe of one frame, before and beyond its first image."""

    canvas: Canvas
    plane: npt.NDArray[np.float32]  # [size, size, 3]
    geometry: Geometry
    acquisition: Acquisition
    placed: lesions.Placed | None
    region: str
    quality: str
    spacing_mm: float
    seed: int
    rng: np.random.Generator
    grey: npt.NDArray[np.uint8]  # [size, size] the still frame


def phantom(
    seed: int, *, size: int = 224, region: str | None = None, kind: Kind = None, quality: str | None = None
) -> Phantom:
    """Make the frame number `seed`; what is not asked for is drawn: regions evenly, a lesion in three frames of five.

    `size` in pixels; `kind` "none" asks for a frame without a lesion. On one machine the same arguments give
    the same bytes.
    Raises SonoEdgeError on an unknown region, kind or quality, a negative seed, or a size under 96.
    """
    made = scene(seed, size=size, region=region, kind=kind, quality=quality)
    mask = np.zeros((size, size), np.uint8) if made.placed is None else made.placed.mask
    return finish(made, made.grey, mask, made.canvas.organ & made.geometry.field)


def scene(
    seed: int,
    *,
    size: int,
    region: str | None,
    kind: Kind,
    quality: str | None,
    margin: float = lesions.SIDE_MARGIN,
) -> Scene:
    """Draw tissue and probe of the frame number `seed`, again until its lesion is seen."""
    _check(seed, size, region, kind, quality)
    choice = np.random.Generator(np.random.SFC64(seed))
    any_region = REGIONS[int(choice.integers(len(REGIONS)))]
    any_quality = QUALITIES[int(choice.random() < POOR_SHARE)]
    any_kind = KINDS[int(choice.integers(len(KINDS)))] if choice.random() < LESION_SHARE else "none"
    region, quality, kind = region or any_region, quality or any_quality, kind or any_kind
    for attempt in range(_ATTEMPTS):
        rng = np.random.Generator(np.random.SFC64([seed, attempt]))
        probe = geometry(int(rng.integers(BANK)), size)
        canvas = Canvas(probe, rng, 0.0)
        DRAWERS[region](canvas)
        settings = acquisition(quality, rng)
        placed = None
        if kind != "none":
            placed = lesions.place(canvas, kind, rng, margin)
            if placed is None or _under_gap(placed, probe, settings):
                continue
            lesions.draw(canvas, placed, rng)
        plane = scatter(canvas, rng)
        grey = insonify(plane, probe, settings, rng)
        if placed is None or visible(grey, probe.field, placed):
            depth_mm = DEPTH_MM[region] * rng.uniform(0.92, 1.08)
            return Scene(
                canvas, plane, probe, settings, placed, region, quality, depth_mm / probe.depth_px, seed, rng, grey
            )
    raise SonoEdgeError(
        f"phantom seed {seed} shows no visible {kind} in {region} ({quality}) after {_ATTEMPTS} attempts; "
        "choose another seed"
    )


def finish(
    made: Scene, grey: npt.NDArray[np.uint8], lesion_mask: npt.NDArray[np.uint8], organ_mask: npt.NDArray[np.uint8]
) -> Phantom:
    """Put an image and its masks together with the truth that the masks tell."""
    lesion = None
    if made.placed is not None:
        lesion = _measure(made.placed.kind, lesion_mask, made.geometry, made.spacing_mm)
    truth = Truth(made.region, made.quality, made.geometry.name, made.spacing_mm, lesion, made.seed, made.canvas.size)
    image = cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB)
    return Phantom(np.asarray(image, np.uint8), lesion_mask.astype(bool), organ_mask.astype(bool), truth)


def _measure(kind: str, mask: npt.NDArray[np.uint8], probe: Geometry, spacing_mm: float) -> Lesion:
    moments = cv2.moments(mask, binaryImage=True)
    area = moments["m00"]
    x, y = moments["m10"] / area, moments["m01"] / area
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    hull = cv2.convexHull(np.concatenate(contours))[:, 0].astype(np.float64)  # [n, 2]
    longest = float(np.sqrt(np.square(hull[:, None] - hull[None]).sum(axis=2).max())) + 1.0
    return Lesion(
        kind=kind,
        side="left" if x < (probe.size - 1) / 2 else "right",
        radius_px=float(np.sqrt(area / np.pi)),
        size_mm=longest * spacing_mm,
        depth_mm=probe.depth_at(x, y) * spacing_mm,
        centre_px=(float(x), float(y)),
    )


def _under_gap(placed: lesions.Placed, probe: Geometry, settings: Acquisition) -> bool:
    """True when beams without contact cross the lesion."""
    columns = probe.beam_x[placed.mask.astype(bool)] / (probe.beams - 1) * 2 - 1
    low, high = float(columns.min()), float(columns.max())
    return any(low - 0.12 < centre + half and high + 0.12 > centre - half for centre, half in settings.gaps)


def _check(seed: int, size: int, region: str | None, kind: Kind, quality: str | None) -> None:
    known = (*REGIONS, *UNTRAINED_REGIONS)
    if region is not None and region not in known:
        raise SonoEdgeError(f"phantom region {region!r} is unknown; choose one of {', '.join(known)}")
    if kind is not None and kind not in (*KINDS, "none"):
        raise SonoEdgeError(f"phantom kind {kind!r} is unknown; choose one of {', '.join(KINDS)} or none")
    if quality is not None and quality not in QUALITIES:
        raise SonoEdgeError(f"phantom quality {quality!r} is unknown; choose one of {', '.join(QUALITIES)}")
    if seed < 0:
        raise SonoEdgeError(f"phantom seed {seed} is negative; use zero or a positive number")
    if size < MIN_SIZE:
        raise SonoEdgeError(f"phantom size {size} is too small; use at least {MIN_SIZE} pixels")
