"""The measures of a fidelity report on plain arrays: divergence of distributions, signal to noise, expert sets."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Decibels = float | Literal["infinite"]  # infinite: not one bit differs


def kl_divergence(reference: Floats, candidate: Floats) -> npt.NDArray[np.float64]:
    """KL(reference || candidate) of each row's distribution in nats, logits [n, vocab] to [n]."""
    wanted, found = _log_softmax(reference), _log_softmax(candidate)
    divergence: npt.NDArray[np.float64] = (np.exp(wanted) * (wanted - found)).sum(axis=1)
    return np.maximum(divergence, 0)  # a sum of rounding errors may fall below 0, where no divergence lies


def lead(logits: Floats, ahead: int, behind: int) -> float:
    """By how much token `ahead` is more probable than token `behind`, logits [vocab]."""
    logarithms = _log_softmax(logits[None])[0]
    return float(np.exp(logarithms[ahead]) - np.exp(logarithms[behind]))


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    normalised: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalised


def expert_sets(router: Floats, top: int) -> npt.NDArray[np.bool_]:
    """Which experts each token goes to, router logits [tokens, experts] to bool of the same shape.

    Softmax keeps the order, so the logits say as much as the weights; of equals, the first is chosen.
    """
    chosen = np.argsort(-router, axis=1, kind="stable")[:, :top]
    sets = np.zeros(router.shape, np.bool_)
    np.put_along_axis(sets, chosen, values=True, axis=1)
    return sets


class SignalToNoise:
    """The ratio of a signal's power to that of what was changed in it, gathered piece by piece."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, reference: Floats, candidate: Floats) -> None:
        """Take in arrays of the same shape."""
        wanted = reference.astype(np.float64)
        self._signal += float(np.square(wanted).sum())
        self._noise += float(np.square(wanted - candidate).sum())

    @property
    def decibels(self) -> Decibels:
        """10 log10 of the ratio."""
        if self._noise == 0:
            return "infinite"
        return 10 * math.log10(max(self._signal, np.finfo(np.float64).tiny) / self._noise)
