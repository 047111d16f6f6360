"""SmoothQuant: moves the spread of an activation's channels into the weights that read it, so that int8 fits both.

optimum leaves SmoothQuant to onnxruntime's helper, which needs a package that is gone; here it works on torch tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

LEVELS = 127  # of symmetric int8
ALPHAS = tuple(tenth / 10 for tenth in range(1, 11))
MOST_TOKENS = 256
MOST_ROWS = 512  # of each matrix
SMALLEST, LARGEST = 2**-13, 2**13  # of a factor: what float32 takes without harm


class Smoothing(msgspec.Struct, frozen=True):
    """Factors of weights by checkpoint key: w'[r, c] = w[r, c] · row[r] · column[c]; the model's function stays."""

    row_factors: Mapping[str, Tensor]  # float32 [rows]
    column_factors: Mapping[str, Tensor]  # float32 [columns]

    @classmethod
    def none(cls) -> Smoothing:
        """Leave every weight as it is."""
        return cls({}, {})

    def apply(self, key: str, rows: Tensor, first_row: int = 0) -> Tensor:
        """Rows from `first_row` on of the weight `key`, smoothed: float32 [r, …] to the same shape."""
        row, column = self.row_factors.get(key), self.column_factors.get(key)
        if row is not None:
            rows = rows * row[first_row : first_row + rows.shape[0]].view(-1, *[1] * (rows.dim() - 1))
        return rows if column is None else rows * column

    @property
    def sha256(self) -> str:
        """Content hash: the same factors give the same hash."""
        digest = hashlib.sha256()
        for side, factors in (("rows", self.row_factors), ("columns", self.column_factors)):
            for key in sorted(factors):
                values = factors[key].to(torch.float32).contiguous().numpy().astype("<f4")
                digest.update(f"{side} {key} {values.size}\n".encode() + values.tobytes())
        return digest.hexdigest()


class Found(msgspec.Struct, frozen=True):
    """The best exponent of a group and its factors; alpha 0 leaves the group alone, all factors 1."""

    alpha: float
    factors: Tensor  # float32 [channels]


def search(x: Tensor, elsewhere: Tensor, maximum: Tensor, weights: Sequence[Tensor], channel: Tensor) -> Found:
    """Choose the α under which int8 products of x with `weights` come closest to the float ones, and its factors.

    x [tokens, columns]: a sample of the input that all of weights [out, columns] read; elsewhere [columns]: the largest
    |x| of every column in samples that x is not from, by which each α is judged; maximum [columns]: the same over all
    samples, which the factors are made of; channel int64 [columns]: the channel of every column, those with the same
    channel having one factor. Factors are max|X|^α / max|W|^(1-α) (SmoothQuant, arXiv 2211.10438), α searched as in AWQ
    (arXiv 2306.00978) on at most 256 tokens and 512 rows of a matrix, evenly spread.
    """
    channels = int(channel.max()) + 1
    best = Found(0.0, torch.ones(channels))
    if not x.shape[0] or not bool(elsewhere.any()):
        return best
    tokens = evenly(x, MOST_TOKENS)
    rows = [evenly(weight, MOST_ROWS) for weight in weights]
    expected = [functional.linear(tokens, weight) for weight in rows]  # each [tokens, rows]
    largest = torch.stack([torch.linalg.vector_norm(weight, torch.inf, 0) for weight in weights]).amax(0)  # [columns]
    weight_maximum = _channel_maximum(largest, channel, channels)

    def error(factors: Tensor) -> float:
        columns = factors[channel]
        step = float((elsewhere / columns).max()) / LEVELS
        coded = _rounded(tokens / columns, torch.tensor(step))
        total = 0.0
        for weight, reference in zip(rows, expected, strict=True):
            scaled = weight * columns
            product = functional.linear(coded, _rounded(scaled, scaled.abs().amax(1, keepdim=True) / LEVELS))
            # Relative, so that no matrix counts more because its outputs are large.
            total += float((product - reference).square().sum() / reference.square().sum().clamp_min(1e-30))
        return total

    least = error(best.factors)
    # Judged on the very tokens that the factors come from, α = 1 wins on few samples and fails on any other: it fits
    # each channel to its largest value, which the next sample exceeds.
    seen, all_seen = (_channel_maximum(each, channel, channels) for each in (elsewhere, maximum))
    for alpha in ALPHAS:
        found = error(_factors(seen, weight_maximum, alpha))
        if found < least:
            least, best = found, Found(alpha, _factors(all_seen, weight_maximum, alpha))
    return best


def evenly(rows: Tensor, most: int) -> Tensor:
    """At most `most` rows of [n, …], evenly spread, the first among them."""
    return rows[:: -(-rows.shape[0] // most)] if rows.shape[0] > most else rows


def _factors(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Factors [channels] around 1; a channel that is never active keeps 1."""
    active = activation > 0
    floor = max(SMALLEST * float(weight.max()), torch.finfo(torch.float32).tiny)
    raw = activation.double() ** alpha / weight.double().clamp_min(floor) ** (1 - alpha)
    centre = (raw[active].max() * raw[active].min()).sqrt()
    return torch.where(active, (raw / centre).clamp(SMALLEST, LARGEST), 1.0).to(torch.float32)


def _channel_maximum(columns: Tensor, channel: Tensor, channels: int) -> Tensor:
    return torch.zeros(channels).scatter_reduce_(0, channel, columns, "amax")


def _rounded(values: Tensor, step: Tensor) -> Tensor:
    """Values on the int8 grid of `step`; a step of 0 belongs to values that are all 0."""
    step = step.clamp_min(torch.finfo(torch.float32).tiny)
    return (values / step).round_().clamp_(-LEVELS, LEVELS).mul_(step)
