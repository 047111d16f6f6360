"""Short moving clips: tissue, masks and speckle move together under breathing, the probe and the heartbeat."""

from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import lesions
from sonoedge.calibration.phantom.frame import Kind, finish, scene
from sonoedge.calibration.phantom.physics import insonify
from sonoedge.calibration.phantom.truth import Phantom

Floats = npt.NDArray[np.float32]


def phantom_clip(
    seed: int,
    frames: int,
    *,
    size: int = 224,
    fps: float = 30.0,
    region: str | None = None,
    kind: Kind = None,
    quality: str | None = None,
) -> Iterator[Phantom]:
    """Yield the frames of one moving scene; each frame's truth is measured on its own masks.

    `size` in pixels, `fps` in frames a second. Raises SonoEdgeError as `phantom` does.
    """
    made = scene(seed, size=size, region=region, kind=kind, quality=quality, margin=lesions.SIDE_MARGIN + 0.03)
    rng, probe, scale = made.rng, made.geometry, size / 224
    breath_px = np.array([rng.uniform(-1.2, 1.2), rng.uniform(2.0, 4.0)]) * scale
    breath_hz, breath_phase = rng.uniform(0.22, 0.33), rng.uniform(0, 2 * np.pi)
    drift_px = np.array([rng.uniform(1.0, 2.5), rng.uniform(0.0, 0.8)]) * scale
    drift_hz, drift_phase = rng.uniform(0.08, 0.2), rng.uniform(0, 2 * np.pi)
    beat_hz, beat = rng.uniform(1.0, 1.7), 0.13 if made.region == "heart" else 0.04
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    lesion_mask = np.zeros((size, size), np.uint8) if made.placed is None else made.placed.mask

    def moved(x: Floats, y: Floats, seconds: float) -> tuple[Floats, Floats]:
        """Where the tissue now at (x, y) was when the scene was drawn."""
        shift = breath_px * np.sin(2 * np.pi * breath_hz * seconds + breath_phase)
        shift = shift + drift_px * np.sin(2 * np.pi * drift_hz * seconds + drift_phase)
        # tissue at the probe face stays with the probe
        grip = np.clip((y - np.float32(probe.box[1])) / np.float32(0.2 * size), 0, 1)
        out_x, out_y = x - np.float32(shift[0]) * grip, y - np.float32(shift[1]) * grip
        if made.canvas.pulse is not None:
            cx, cy, radius = made.canvas.pulse
            dx, dy = out_x - np.float32(cx), out_y - np.float32(cy)
            weight = cv2.exp((dx * dx + dy * dy) * np.float32(-1 / (2 * radius * radius)))
            squeeze = np.float32(beat * max(0.0, np.sin(2 * np.pi * beat_hz * seconds)) ** 1.5) * weight * grip
            out_x, out_y = out_x + dx * squeeze, out_y + dy * squeeze
        return np.asarray(out_x, np.float32), np.asarray(out_y, np.float32)

    for index in range(frames):
        seconds = index / fps
        grey = insonify(made.plane, probe, made.acquisition, rng, moved(probe.plane_x, probe.plane_y, seconds))
        now = moved(xs, ys, seconds)
        organ, lesion = (
            (cv2.remap(mask * 255, *now, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) > 127).astype(np.uint8)
            for mask in (made.canvas.organ, lesion_mask)
        )
        yield finish(made, grey, lesion, organ & probe.field)
