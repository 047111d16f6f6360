"""Layers that several regions share: skin and fat, striated muscle, bone with its shadow."""

from itertools import pairwise

import numpy as np

from sonoedge.calibration.phantom.canvas import Canvas, Points, lowered


def skin(canvas: Canvas, depth: float) -> Points:
    """Two bright lines with mid-grey skin between them, down to `depth`; returns the lower line."""
    top, bottom = canvas.curve(-0.02), canvas.curve(depth, wave=0.003)
    canvas.band(top, bottom, 2.0)
    canvas.reflect(canvas.curve(0.012), 3.0, 1.6)
    canvas.reflect(bottom, 2.4, 1.2)
    return bottom


def muscle(
    canvas: Canvas, upper: Points, lower: Points, echo_db: float, strands: int, *, fascia: float = 4.0
) -> Points:
    """Hypoechoic muscle with bright strands that run along it, between two fascias."""
    outline = canvas.band(upper, lower, echo_db)
    for fraction in np.linspace(0.12, 0.88, strands):
        line = upper + (lower - upper) * (fraction + canvas.rng.uniform(-0.04, 0.04))
        start = int(canvas.rng.integers(0, 12))
        canvas.reflect(line[start : start + int(canvas.rng.integers(10, 22))], canvas.rng.uniform(0.8, 1.6), 1.0)
    canvas.reflect(upper, fascia, 1.5)
    canvas.reflect(lower, fascia, 1.5)
    return outline


def bone(canvas: Canvas, x: float, y: float, rx: float, ry: float) -> None:
    """A bright arc facing the probe, with a clean shadow from it."""
    t = np.linspace(np.pi * 1.08, np.pi * 1.92, 20)
    arc = np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=1)
    below = np.concatenate([arc, lowered(arc, 1.2 * ry)[::-1]])
    canvas.fill(below, -14.0, 30.0 / max(ry, 1.0))
    canvas.reflect(arc, 6.5, 2.2)


def tube(canvas: Canvas, points: Points, echo_db: float, width: float, wall: float) -> None:
    """A vessel along a curve: dark inside, `width` pixels at 224, with walls of amplitude `wall` (0: none)."""
    canvas.stroke(points, echo_db, width)
    if wall > 0:
        direction = np.gradient(points, axis=0)
        normal = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-6)
        for sign in (-1, 1):
            canvas.reflect(points + sign * normal * canvas.px(width / 2 + 0.5), wall, 1.3)


def bezier(*nodes: tuple[float, float], n: int = 24) -> Points:
    """A smooth curve from the first node to the last, pulled by those between. [n, 2]"""
    t = np.linspace(0, 1, n)[:, None]
    points = [np.array(node, dtype=np.float64)[None, :].repeat(n, axis=0) for node in nodes]
    while len(points) > 1:
        points = [(1 - t) * a + t * b for a, b in pairwise(points)]
    return points[0]
