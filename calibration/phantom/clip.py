"""Short moving clips: tissue, masks and speckle move together under breathing, the probe and the heartbeat."""

from collections.abc import Iterator

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import lesions
from sonoedge.calibration.phantom.frame import Kind, Scene, finish, scene
from sonoedge.calibration.phantom.physics import insonify
from sonoedge.calibration.phantom.truth import Phantom
from sonoedge.errors import SonoEdgeError

Floats = npt.NDArray[np.float32]

_MOTION_MARGIN = 0.05  # how far motion may carry a lesion towards the middle, as a fraction of the size


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
    """Make the frames of one moving scene; each frame's truth is measured on its own masks.

    `size` in pixels, `fps` in frames a second. Raises SonoEdgeError as `phantom` does, and for a frame rate that is not
    positive.
    """
    if not fps > 0:
        raise SonoEdgeError(f"phantom clip fps {fps} is not positive; use the frames a second of the clip, such as 30")
    return clip_of(clip_scene(seed, size=size, region=region, kind=kind, quality=quality), frames, fps)


def clip_scene(
    seed: int, *, size: int = 224, region: str | None = None, kind: Kind = None, quality: str | None = None
) -> Scene:
    """Draw the scene of a clip; raises SonoEdgeError as `phantom` does."""
    return scene(
        seed, size=size, region=region, kind=kind, quality=quality, margin=lesions.SIDE_MARGIN + _MOTION_MARGIN
    )


def clip_of(made: Scene, frames: int, fps: float) -> Iterator[Phantom]:
    """Yield the frames of one moving scene."""
    size = made.canvas.size
    rng, probe = made.rng, made.geometry
    motion = Motion.draw(made)
    ys, xs = np.mgrid[0:size, 0:size].astype(np.float32)
    lesion_mask = np.zeros((size, size), np.uint8) if made.placed is None else made.placed.mask
    for index in range(frames):
        seconds = index / fps
        grey = insonify(made.plane, probe, made.acquisition, rng, motion.before(probe.plane_x, probe.plane_y, seconds))
        x, y = motion.before(xs, ys, seconds)
        organ, lesion = (
            (cv2.remap(mask * 255, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) > 127).astype(np.uint8)
            for mask in (made.canvas.organ, lesion_mask)
        )
        yield finish(made, grey, lesion, organ & probe.field)


class Motion(msgspec.Struct, frozen=True):
    """How tissue moves: breathing, a drifting hand, and the heartbeat around one place."""

    breath_px: tuple[float, float]
    breath_hz: float
    drift_px: tuple[float, float]
    drift_hz: float
    phase: tuple[float, float]
    beat_hz: float
    squeeze: float  # the largest relative shortening towards the beating place
    pulse: tuple[float, float, float] | None  # x, y, radius of the beating place
    top: float  # y of the probe face
    grip_px: float  # depth over which tissue stays with the probe

    @classmethod
    def draw(cls, made: Scene) -> "Motion":
        """Draw the motion of a scene from its own random numbers."""
        rng, scale = made.rng, made.canvas.scale
        return cls(
            breath_px=(rng.uniform(-1.2, 1.2) * scale, rng.uniform(2.0, 4.0) * scale),
            breath_hz=rng.uniform(0.22, 0.33),
            drift_px=(rng.uniform(1.0, 2.5) * scale, rng.uniform(0.0, 0.8) * scale),
            drift_hz=rng.uniform(0.08, 0.2),
            phase=(rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)),
            beat_hz=rng.uniform(1.0, 1.7),
            squeeze=0.13 if made.region == "heart" else 0.04,
            pulse=made.canvas.pulse,
            top=made.geometry.box[1],
            grip_px=0.2 * made.canvas.size,
        )

    def before(self, x: Floats, y: Floats, seconds: float) -> tuple[Floats, Floats]:
        """Where the tissue that is now at (x, y) was when the scene was drawn."""
        breath = np.sin(2 * np.pi * self.breath_hz * seconds + self.phase[0])
        drift = np.sin(2 * np.pi * self.drift_hz * seconds + self.phase[1])
        shift_x = np.float32(self.breath_px[0] * breath + self.drift_px[0] * drift)
        shift_y = np.float32(self.breath_px[1] * breath + self.drift_px[1] * drift)
        grip = np.clip((y - np.float32(self.top)) * np.float32(1 / self.grip_px), 0, 1)
        x, y = x - shift_x * grip, y - shift_y * grip
        if self.pulse is not None:
            cx, cy, radius = self.pulse
            dx, dy = x - np.float32(cx), y - np.float32(cy)
            beat = max(0.0, float(np.sin(2 * np.pi * self.beat_hz * seconds))) ** 1.5
            pull = cv2.exp((dx * dx + dy * dy) * np.float32(-0.5 / radius**2)) * grip * np.float32(self.squeeze * beat)
            x, y = x + dx * pull, y + dy * pull
        return np.asarray(x, np.float32), np.asarray(y, np.float32)
