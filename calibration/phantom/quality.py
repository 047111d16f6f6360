"""How a frame is acquired: settings of a good frame, and the ways in which a poor one is poor."""

import msgspec
import numpy as np


class Acquisition(msgspec.Struct, frozen=True):
    """Settings of one frame; lengths are pixels of beam space at size 224."""

    gain_db: float
    range_db: float  # dynamic range of the grey scale
    noise_db: float  # receiver noise at the surface, against mid-grey tissue
    noise_rise_db: float  # how much more at full depth, where the time-gain compensation is highest
    loss_db: float  # attenuation left uncompensated at full depth
    axial_px: float  # deviation of the point-spread function along the beam
    lateral_px: float  # and across it, at the focus
    defocus_px: float  # extra width away from the focus
    focus: float  # depth of the focus, fraction
    blur_px: float  # of the finished image
    gaps: tuple[tuple[float, float], ...]  # beams without contact: centre and half width, from -1 to 1
    gamma: float


def acquisition(quality: str, rng: np.random.Generator) -> Acquisition:
    """Draw the settings of a frame whose quality is "good" or "poor"."""
    good = Acquisition(
        gain_db=rng.uniform(-2.0, 5.0),
        range_db=rng.uniform(48.0, 60.0),
        noise_db=rng.uniform(-42.0, -36.0),
        noise_rise_db=rng.uniform(3.0, 9.0),
        loss_db=rng.uniform(-1.0, 5.0),
        axial_px=rng.uniform(0.65, 1.0),
        lateral_px=rng.uniform(0.7, 1.15),
        defocus_px=rng.uniform(0.5, 1.4),
        focus=rng.uniform(0.2, 0.8),
        blur_px=rng.uniform(0.0, 0.5),
        gaps=(),
        gamma=rng.uniform(0.9, 1.15),
    )
    if quality == "good":
        return good
    first, second = rng.permutation(len(_FAULTS))[:2]
    poor = _FAULTS[first](good, rng)
    return _FAULTS[second](poor, rng) if rng.random() < 0.25 else poor


def _low_gain(a: Acquisition, rng: np.random.Generator) -> Acquisition:
    return msgspec.structs.replace(a, gain_db=rng.uniform(-15.5, -12.0))


def _noisy(a: Acquisition, rng: np.random.Generator) -> Acquisition:
    # a deep or shielded target with the gain turned up: the dark parts fill with noise
    return msgspec.structs.replace(
        a, gain_db=rng.uniform(2.0, 7.0), noise_db=rng.uniform(-10.0, -7.0), noise_rise_db=rng.uniform(2.0, 4.0)
    )


def _attenuated(a: Acquisition, rng: np.random.Generator) -> Acquisition:
    return msgspec.structs.replace(a, loss_db=rng.uniform(24.0, 34.0))


def _blurred(a: Acquisition, rng: np.random.Generator) -> Acquisition:
    return msgspec.structs.replace(a, blur_px=rng.uniform(2.0, 2.7), defocus_px=rng.uniform(2.5, 3.5))


def _no_contact(a: Acquisition, rng: np.random.Generator) -> Acquisition:
    sides = (-1.0, 1.0) if rng.random() < 0.4 else (float(rng.choice((-1.0, 1.0))),)
    width = rng.uniform(0.28, 0.4) if len(sides) == 2 else rng.uniform(0.42, 0.6)
    gaps = tuple((side, float(width)) for side in sides)
    return msgspec.structs.replace(a, gaps=gaps)


_FAULTS = (_low_gain, _noisy, _attenuated, _blurred, _no_contact)
