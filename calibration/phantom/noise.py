"""Seeded pools of Gaussian noise, drawn once: a frame takes a random window, far cheaper than fresh normals."""

from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_SIDE = 1024


@lru_cache(maxsize=1)
def _scatterers() -> Floats:
    """Complex white noise of unit power: real and imaginary plane. [2, side, side]"""
    rng = np.random.Generator(np.random.SFC64(20_240_611))
    return np.asarray(rng.standard_normal((2, _SIDE, _SIDE), dtype=np.float32) * np.float32(np.sqrt(0.5)), np.float32)


@lru_cache(maxsize=1)
def _electronic() -> Floats:
    """Power of receiver noise, mean 1, one receive filter wide. [side, side]"""
    parts = [cv2.GaussianBlur(part[::-1, ::-1], (0, 0), sigmaX=0.9, sigmaY=0.7) for part in _scatterers()]
    power = np.square(parts[0]) + np.square(parts[1])
    return np.asarray(power / power.mean(), dtype=np.float32)


def _window(pool: Floats, rng: np.random.Generator, height: int, width: int) -> Floats:
    """A random window of the last two axes, mirrored at random."""
    while pool.shape[-2] < height or pool.shape[-1] < width:
        pool = np.concatenate([np.concatenate([pool, pool[..., ::-1]], axis=-1)] * 2, axis=-2)
    y = int(rng.integers(0, pool.shape[-2] - height + 1))
    x = int(rng.integers(0, pool.shape[-1] - width + 1))
    flip = int(rng.integers(0, 4))
    window = pool[..., y : y + height, x : x + width]
    return window[..., :: -1 if flip & 1 else 1, :: -1 if flip & 2 else 1]


def scatterers(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Complex scatterer strengths of unit mean power: real and imaginary plane. [2, height, width]"""
    return _window(_scatterers(), rng, height, width)


def electronic(rng: np.random.Generator, height: int, width: int) -> Floats:
    """Receiver noise power of mean 1. [height, width]"""
    return _window(_electronic(), rng, height, width)


def smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> Floats:
    """Slow texture of about unit deviation with `cells` bumps across. [height, width]"""
    coarse = _window(_scatterers()[0], rng, cells + 2, cells + 2)
    fine = cv2.resize(np.ascontiguousarray(coarse), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.asarray(fine * np.float32(1.9), dtype=np.float32)
