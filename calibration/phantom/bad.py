"""Frames that show no patient: a probe in air, a probe with little contact, and a black screen."""

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import noise
from sonoedge.calibration.phantom.frame import scene
from sonoedge.calibration.phantom.geometry import BANK, Geometry, geometry
from sonoedge.calibration.phantom.physics import insonify

Grey = npt.NDArray[np.uint8]

LOST = (0.52, 0.85)  # share of the beams without contact; what is called poor quality has at most 0.4


class Bad(msgspec.Struct, frozen=True, eq=False):
    """One frame and the probe that made it."""

    image: Grey  # [size, size, 3] RGB, grey
    geometry: Geometry


def in_air(seed: int, *, size: int = 224, probe: Geometry | None = None) -> Bad:
    """Reverberations of the probe's own face, weaker with depth, alike under every element; `probe` drawn when None."""
    rng = np.random.Generator(np.random.SFC64([31, seed]))
    drawn = geometry(int(rng.integers(BANK)), size)
    probe = probe or drawn
    depth = np.linspace(0, 1, probe.samples, dtype=np.float32)[:, None]
    period, decay = rng.uniform(0.03, 0.12), rng.uniform(4.5, 11.0)
    phase = (depth % np.float32(period)) / np.float32(period)
    bands = cv2.exp(-np.square((phase - np.float32(0.3)) / np.float32(rng.uniform(0.12, 0.3))))
    level = np.asarray(bands, np.float32) * np.float32(rng.uniform(120, 240)) * cv2.exp(depth * np.float32(-decay))
    level = level + 200 * cv2.exp(depth * np.float32(-90))
    across = 1 + np.float32(rng.uniform(0.02, 0.12)) * noise.smooth(rng, probe.samples, probe.beams, 5)
    grain = cv2.sqrt(noise.electronic(rng, probe.samples, probe.beams)) * np.float32(rng.uniform(0, 5))
    beams = np.clip(level * across * rng.uniform(0.9, 1.1) + grain, 0, 255).astype(np.uint8)
    return Bad(_rgb(probe.to_image(beams)), probe)


def poor_contact(seed: int, *, size: int = 224, lost: float | None = None) -> Bad:
    """A frame of tissue in which a share `lost` of the beams, at one side or both, has no contact; drawn when None."""
    rng = np.random.Generator(np.random.SFC64([32, seed]))
    made = scene(seed, size=size, region=None, kind="none", quality="good")
    share = rng.uniform(*LOST) if lost is None else lost
    part = rng.uniform(0.3, 0.7) if rng.random() < 0.4 else float(rng.integers(2))
    gaps = tuple((side, 2 * share * of) for side, of in ((-1.0, part), (1.0, 1 - part)) if of > 0)
    settings = msgspec.structs.replace(made.acquisition, gaps=gaps)
    return Bad(_rgb(insonify(made.plane, made.geometry, settings, rng)), made.geometry)


def black(seed: int, *, size: int = 224, probe: Geometry | None = None) -> Bad:
    """A screen without echoes, with at most the faintest noise."""
    rng = np.random.Generator(np.random.SFC64([33, seed]))
    drawn = geometry(int(rng.integers(BANK)), size)
    probe = probe or drawn
    values = rng.integers(0, int(rng.integers(1, 7)), (size, size), dtype=np.uint8) * probe.field
    return Bad(_rgb(np.asarray(values, np.uint8)), probe)


def _rgb(grey: Grey) -> Grey:
    return np.asarray(cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), np.uint8)
