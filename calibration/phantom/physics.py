"""From a tissue plane to a B-mode frame: scatterers, point spread, attenuation along beams, log compression."""

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.calibration.phantom import noise
from sonoedge.calibration.phantom.canvas import SPECULAR_FULL, Canvas
from sonoedge.calibration.phantom.geometry import Geometry
from sonoedge.calibration.phantom.quality import Acquisition

Floats = npt.NDArray[np.float32]

_LN_DB = np.float32(np.log(10) / 10)  # natural logarithm of power a dB


def scatter(canvas: Canvas, rng: np.random.Generator) -> Floats:
    """Complex scatterer field and attenuation of a tissue plane. [size, size, 3]: real, imaginary, dB a pixel"""
    size = canvas.size
    echo = cv2.GaussianBlur(canvas.echo_db, (0, 0), 0.7)
    amplitude = cv2.exp(echo * (_LN_DB / 2))
    real, imaginary = noise.scatterers(rng, size, size)
    mirror = canvas.specular * np.float32(SPECULAR_FULL / 255)
    amplitude += mirror * np.float32(0.55)  # no boundary is smooth: part of its echo is rough
    return np.asarray(
        cv2.merge([real * amplitude + mirror * np.float32(0.75), imaginary * amplitude, canvas.attenuation]), np.float32
    )


def insonify(
    plane: Floats,
    geometry: Geometry,
    a: Acquisition,
    rng: np.random.Generator,
    maps: tuple[Floats, Floats] | None = None,
) -> npt.NDArray[np.uint8]:
    """Form the frame that a probe sees of a scatterer plane.

    `plane` [size, size, 3] as `scatter` makes it; `maps` [samples, beams] x and y replace the still tissue's places,
    for motion. Returns grey [size, size], black outside the field of view.
    """
    scale = geometry.size / 224
    samples, beams = geometry.samples, geometry.beams
    map_x, map_y = maps or (geometry.plane_x, geometry.plane_y)
    beam = cv2.remap(plane, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    real, imaginary, attenuation = cv2.split(beam)  # [samples, beams] each
    depth = np.linspace(0, 1, samples, dtype=np.float32)[:, None]

    # the beam is narrow at the focus and widens away from it
    away = np.minimum(1, np.abs(depth - np.float32(a.focus)) * np.float32(1.6))
    wide_gain = np.float32(np.sqrt(np.hypot(a.lateral_px, a.defocus_px) / a.lateral_px))
    power = np.zeros((samples, beams), np.float32)
    for part in (real, imaginary):
        sharp = cv2.GaussianBlur(part, (0, 0), sigmaX=a.lateral_px * scale, sigmaY=a.axial_px * scale)
        wide = cv2.GaussianBlur(sharp, (0, 0), sigmaX=max(a.defocus_px * scale, 0.3), sigmaY=0.3)
        echo = sharp * (1 - away) + wide * (away * wide_gain)
        power += echo * echo
    # 4 pi sx sy is the inverse power gain of a Gaussian kernel on white noise
    power *= np.float32(4 * np.pi * max(a.lateral_px * scale, 0.4) * max(a.axial_px * scale, 0.4))

    loss = np.cumsum(attenuation, axis=0) * np.float32(geometry.depth_px / samples)
    loss = cv2.GaussianBlur(loss, (0, 0), sigmaX=1.2 * scale, sigmaY=0.6)
    loss += np.float32(a.loss_db) * depth
    for centre, half in a.gaps:
        across = np.linspace(-1, 1, beams, dtype=np.float32)[None, :]
        loss += 38 / (1 + cv2.exp((np.abs(across - np.float32(centre)) - np.float32(half)) * np.float32(40)))
    power *= cv2.exp(loss * -_LN_DB)
    floor = cv2.exp((a.noise_db + a.noise_rise_db * depth) * _LN_DB)
    power += noise.electronic(rng, samples, beams) * floor
    # ring-down of the probe face
    power += cv2.exp(depth * np.float32(-160)) * 40

    grey = cv2.log(power) * np.float32(255 / _LN_DB / a.range_db) + np.float32(255 * (0.52 + a.gain_db / a.range_db))
    curve = (np.linspace(0, 1, 256) ** a.gamma * 255).astype(np.uint8)
    image = cv2.LUT(geometry.to_image(np.clip(grey, 0, 255).astype(np.uint8)), curve)
    if a.blur_px > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), a.blur_px * scale) * geometry.field
    return np.asarray(image, dtype=np.uint8)
