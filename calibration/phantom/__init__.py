"""Seeded synthetic B-mode ultrasound with exact truth: frames and clips of seven regions and two untrained ones."""

from sonoedge.calibration.phantom.clip import phantom_clip
from sonoedge.calibration.phantom.frame import phantom
from sonoedge.calibration.phantom.truth import (
    GEOMETRIES,
    KINDS,
    QUALITIES,
    REGIONS,
    UNTRAINED_REGIONS,
    Lesion,
    Phantom,
    Truth,
)

__all__ = [
    "GEOMETRIES",
    "KINDS",
    "QUALITIES",
    "REGIONS",
    "UNTRAINED_REGIONS",
    "Lesion",
    "Phantom",
    "Truth",
    "phantom",
    "phantom_clip",
]
