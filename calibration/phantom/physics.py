"""From a tissue plane to a B-mode frame: scatterers, point-spread function, attenuation along beams, log compression."""

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
    plane = np.empty((size, size, 3), np.float32)
    plane[:, :, :2] = noise.scatterers(rng, size, size)
    plane[:, :, :2] *= amplitude[:, :, None]
    plane[:, :, 0] += canvas.specular * np.float32(SPECULAR_FULL / 255)
    plane[:, :, 2] = canvas.attenuation
    return plane


def insonify(
    plane: Floats, geometry: Geometry, a: Acquisition, rng: np.random.Generator, maps: tuple[Floats, Floats] | None = None
) -> npt.NDArray[np.uint8]:
    """Form the frame that a probe sees of a scatterer plane.

    `plane` [size, size, 3] as `scatter` makes it; `maps` [samples, beams] x and y replace the still tissue's places, for motion.
    Returns grey [size, size], black outside the field of view.
    """
    scale = geometry.size / 224
    samples, beams = geometry.samples, geometry.beams
    map_x, map_y = maps or (geometry.plane_x, geometry.plane_y)
    beam = cv2.remap(plane, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)  # [samples, beams, 3]
    depth = np.linspace(0, 1, samples, dtype=np.float32)[:, None]

    # the beam is narrow at the focus and widens away from it
    field = np.ascontiguousarray(beam[:, :, :2])
    sharp = cv2.GaussianBlur(field, (0, 0), sigmaX=a.lateral_px * scale, sigmaY=a.axial_px * scale)
    wide = cv2.GaussianBlur(sharp, (0, 0), sigmaX=max(a.defocus_px * scale, 0.3), sigmaY=0.3)
    away = np.minimum(1, np.abs(depth - np.float32(a.focus)) * np.float32(1.6))
    wide_gain = np.float32(np.sqrt(np.hypot(a.lateral_px, a.defocus_px) / a.lateral_px))
    field = sharp * (1 - away)[:, :, None] + wide * (away * wide_gain)[:, :, None]
    # 4 pi sx sy is the inverse power gain of a Gaussian kernel on white noise
    power = (np.square(field[:, :, 0]) + np.square(field[:, :, 1])) * np.float32(
        4 * np.pi * max(a.lateral_px * scale, 0.4) * max(a.axial_px * scale, 0.4)
    )

    loss = np.cumsum(beam[:, :, 2], axis=0) * np.float32(geometry.depth_px / samples)
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

    grey = cv2.log(power) * np.float32(1 / _LN_DB / a.range_db) + np.float32(0.52 + a.gain_db / a.range_db)
    grey = np.clip(grey, 0, 1)
    if a.gamma != 1:
        grey = cv2.pow(grey, a.gamma)
    image = geometry.to_image(grey)
    if a.blur_px > 0.25:
        image = cv2.GaussianBlur(image, (0, 0), a.blur_px * scale) * geometry.field
    return np.asarray(image * 255, dtype=np.uint8)
