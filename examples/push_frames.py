"""Feeds `sonoedge serve --source ipc:///tmp/sonoedge-frames` from the callback of a device's SDK.

The class below stands in for a handheld probe's SDK. It calls back with what Clarius' Cast API gives: the bytes of a
scan-converted picture, its size, the micrometres of a pixel, the probe's own time in nanoseconds, and two more values.
With a real SDK, give it `new_processed_image` instead.

    python examples/push_frames.py [ENDPOINT] [--frames N]
"""

import argparse
import time
from collections.abc import Callable

import numpy as np

from sonoedge.runtime.sources.pusher import FramePusher

ProcessedImage = Callable[[bytes, int, int, int, float, int, float, list[object]], None]


class SpeckleProbe:
    """A probe without a patient: it calls back with speckle, 30 times a second, and counts time from its own start."""

    def __init__(self, callback: ProcessedImage) -> None:
        self._callback = callback

    def run(self, frames: int) -> None:
        """Call back `frames` times from this thread; an SDK does it from one of its own."""
        random = np.random.default_rng(0)
        depth_fade = np.linspace(1.0, 0.3, 480)[:, None]
        began_ns = time.monotonic_ns()
        for _ in range(frames):
            grey = (random.rayleigh(40, (480, 640)) * depth_fade).clip(0, 255).astype(np.uint8)
            bgra = np.repeat(grey[:, :, None], 4, axis=2).tobytes()
            self._callback(bgra, 640, 480, len(bgra), 150.0, time.monotonic_ns() - began_ns, 0.0, [])
            time.sleep(1 / 30)


def main() -> None:
    """Push until all frames are sent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", nargs="?", default="ipc:///tmp/sonoedge-frames")
    parser.add_argument("--frames", type=int, default=900)
    options = parser.parse_args()

    pusher = FramePusher(options.endpoint)
    taken = 0

    def new_processed_image(
        image: bytes,
        width: int,
        height: int,
        size: int,
        microns_per_pixel: float,
        timestamp_ns: int,
        _angle: float,
        _imu: list[object],
    ) -> None:
        nonlocal taken
        bgra = np.frombuffer(image, np.uint8, size).reshape(height, width, 4)
        taken += pusher.push(bgra[:, :, 2::-1], spacing_mm=microns_per_pixel / 1000, device_ns=timestamp_ns)

    SpeckleProbe(new_processed_image).run(options.frames)
    print(f"{taken} of {options.frames} frames were taken")
    pusher.close()


if __name__ == "__main__":
    main()
