"""The outline that holds the most evidence and the least emptiness, found by drawing and improving outlines."""

from collections.abc import Callable

import numpy as np

from sonoedge.runtime.sector.outline import AXIS, BOTTOM, BOW, FACE, HALF, SLOPE, TOP, Floats, Outline, spans

DRAWN = 240  # outlines of a kind that are drawn at random about the extent of what was seen
KEPT = 32  # of them are improved
ROUNDS = 20
CHILDREN = 4  # of each, a round
SETTLING = 0.82  # by which changes become smaller, a round
FINE_STEP = 2.5  # pixels
COARSE = 3  # thumbs are thinned so much for the first rounds


Kind = Callable[[np.random.Generator, Floats, int], Floats]


def fit(weights: Floats, extent: tuple[float, float, float, float], seed: int = 0) -> Outline:
    """Return the outline with the largest sum of `weights` [height, width] inside, the same for the same arguments.

    extent: x0, y0, x1, y1 of what was seen, in pixels; sides shorter than 3 pixels cannot be searched.
    """
    rng = np.random.Generator(np.random.SFC64(seed))
    coarse = weights[: weights.shape[0] // COARSE * COARSE, : weights.shape[1] // COARSE * COARSE]
    blocks = coarse.reshape(coarse.shape[0] // COARSE, COARSE, -1, COARSE).mean(axis=(1, 3))
    small, fine = np.divide(extent, COARSE, dtype=np.float32), _sums(weights)
    grown = np.array([COARSE, COARSE, 1, COARSE, COARSE, 1 / COARSE, 1 / COARSE], np.float32)
    best, best_gain = np.empty(7, np.float32), -np.inf
    kinds: tuple[Kind, Kind] = (_linear, _round)
    for draw in kinds:
        begun = _improved(
            rng, _sums(blocks), draw(rng, small, DRAWN), 0.06 * float(small[2] - small[0]), ROUNDS // 2, draw
        )
        found = _improved(rng, fine, begun * grown, FINE_STEP, ROUNDS, draw)
        gain = float(_gains(fine, found[:1])[0])
        if gain > best_gain:
            best, best_gain = found[0], gain
    return Outline(*(float(number) for number in best))


def _sums(weights: Floats) -> Floats:
    """Sums down each column, a zero first. [height + 1, width]"""
    return np.concatenate([np.zeros((1, weights.shape[1]), np.float32), weights.cumsum(axis=0, dtype=np.float32)])


def _gains(sums: Floats, outlines: Floats) -> Floats:
    """The weight inside each outline; parts of pixels count in part. [n]"""
    height, width = sums.shape[0] - 1, sums.shape[1]
    top, bottom = spans(outlines, width)
    first = np.clip(top, 0, height)
    last = np.maximum(np.clip(bottom + 1, 0, height), first)
    columns = np.arange(width)[None, :]

    def at(rows: Floats) -> Floats:
        whole = np.minimum(rows.astype(np.int32), height - 1)
        upper = sums[whole, columns]
        return np.asarray(upper + (sums[whole + 1, columns] - upper) * (rows - whole), np.float32)

    return np.asarray((at(last) - at(first)).sum(axis=1), np.float32)


def _improved(rng: np.random.Generator, sums: Floats, outlines: Floats, step: float, rounds: int, kind: Kind) -> Floats:
    """The best outlines after rounds of small random changes of `step` pixels and less, the best first. [n, 7]"""
    outlines, gains = _best(outlines, _gains(sums, outlines))
    for turn in range(rounds):
        deep = np.maximum(outlines[:, BOTTOM : BOTTOM + 1] - outlines[:, TOP : TOP + 1], 4)
        one = np.ones_like(deep)
        spread = np.concatenate([one, one, 1.5 / deep, one, one, 4 / deep**2, 4 / deep**2], axis=1)
        some = rng.random((CHILDREN, *outlines.shape), np.float32) < 0.5
        change = rng.standard_normal((CHILDREN, *outlines.shape), np.float32) * spread * some
        moved = _valid((outlines[None] + change * np.float32(step * SETTLING**turn)).reshape(-1, 7), kind)
        outlines, gains = _best(np.concatenate([outlines, moved]), np.concatenate([gains, _gains(sums, moved)]))
    return outlines


def _best(outlines: Floats, gains: Floats) -> tuple[Floats, Floats]:
    order = np.argsort(-gains)[:KEPT]
    return outlines[order], gains[order]


def _valid(outlines: Floats, kind: Kind) -> Floats:
    """The outlines, each made one that a probe of its kind can have. [n, 7]"""
    outlines[:, HALF] = np.maximum(outlines[:, HALF], 0.5)
    outlines[:, SLOPE] = np.clip(outlines[:, SLOPE], 0, 2.5)
    outlines[:, BOTTOM] = np.maximum(outlines[:, BOTTOM], outlines[:, TOP] + 4)
    slope, half, deep = outlines[:, SLOPE], outlines[:, HALF], outlines[:, BOTTOM] - outlines[:, TOP]
    if kind is _linear:
        outlines[:, FACE] = 0
        outlines[:, SLOPE] = np.minimum(slope, 0.6)
        widest = half + deep * outlines[:, SLOPE]
        outlines[:, BOW] = np.clip(outlines[:, BOW], 0, 0.6 / widest)
        outlines[:, BOW] = np.where(outlines[:, BOW] * widest < 0.06, 0, outlines[:, BOW])
        return outlines
    # edges, face and bottom are about one apex
    radius = np.maximum(half / np.maximum(slope, 1e-3), 0.5)
    outlines[:, FACE] = 1 / radius
    outlines[:, BOW] = 1 / (radius + deep)
    return outlines


def _linear(rng: np.random.Generator, extent: Floats, count: int) -> Floats:
    """Rectangles and trapezoids, flat or bowed at the bottom. [count, 7]"""
    x0, y0, x1, y1 = extent
    wide, high = x1 - x0, y1 - y0
    u = rng.random((count, 7), np.float32)
    out = np.zeros((count, 7), np.float32)
    out[:, AXIS] = (x0 + x1) / 2 + (u[:, 0] - 0.5) * 0.2 * wide
    out[:, SLOPE] = np.where(u[:, 1] < 0.5, 0, u[:, 2] * 0.35)
    out[:, HALF] = np.maximum(wide / 2 * (0.85 + 0.25 * u[:, 3]) - out[:, SLOPE] * high, 2)
    out[:, TOP] = y0 + (u[:, 4] - 0.5) * 0.1 * high
    out[:, BOTTOM] = y1 + (u[:, 5] - 0.5) * 0.1 * high
    out[:, BOW] = np.where(u[:, 6] < 0.5, 0, u[:, 6] * 0.4 / wide)
    return _valid(out, _linear)


def _round(rng: np.random.Generator, extent: Floats, count: int) -> Floats:
    """Pieces of rings and fans. [count, 7]"""
    x0, y0, x1, y1 = extent
    wide, high = x1 - x0, y1 - y0
    u = rng.random((count, 6), np.float32)
    out = np.zeros((count, 7), np.float32)
    angle = np.deg2rad(15 + 50 * u[:, 0])
    out[:, AXIS] = (x0 + x1) / 2 + (u[:, 1] - 0.5) * 0.3 * wide
    out[:, SLOPE] = np.tan(angle)
    ratio = np.where(u[:, 2] < 0.3, 0.02, u[:, 2] * 0.75)
    outer = wide / 2 / np.sin(angle) * (0.9 + 0.3 * u[:, 3])
    out[:, HALF] = ratio * outer * np.tan(angle)
    out[:, BOTTOM] = y1 + (u[:, 4] - 0.5) * 0.15 * high
    out[:, TOP] = out[:, BOTTOM] - outer * (1 - ratio)
    return _valid(out, _round)
