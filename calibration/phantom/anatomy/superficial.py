"""Breast and thyroid: layered anatomy close under the probe."""

import numpy as np

from sonoedge.calibration.phantom.anatomy.layers import bezier, bone, muscle, skin, tube
from sonoedge.calibration.phantom.canvas import Canvas, lowered


def breast(canvas: Canvas) -> None:
    """Skin, fat lobules with Cooper's ligaments, a bright glandular layer, pectoral muscle, ribs at the bottom."""
    rng = canvas.rng
    canvas.echo_db[:] = -9.0
    skin(canvas, rng.uniform(0.03, 0.05))
    gland_top = canvas.curve(rng.uniform(0.14, 0.2), wave=0.022)
    gland_bottom = canvas.curve(rng.uniform(0.66, 0.74), wave=0.018)
    gland = canvas.band(gland_top, gland_bottom, 2.0)
    canvas.mark(gland)
    canvas.texture(1.0, 7)
    canvas.texture(2.6, 26, [gland])
    canvas.bed_db = 2.0
    for _ in range(int(rng.integers(5, 9))):  # ligaments cross the fat between skin and gland
        u = rng.uniform(-1, 1)
        a, b = canvas.at(u, 0.04), canvas.at(u + rng.uniform(-0.25, 0.25), 0.22)
        canvas.reflect(bezier(a, canvas.at(u + rng.uniform(-0.2, 0.2), 0.12), b, n=10), rng.uniform(1.5, 3.0), 1.2)
    for _ in range(int(rng.integers(7, 12))):  # glandular septa, wavy and horizontal
        u, v = rng.uniform(-1, 0.7), rng.uniform(0.22, 0.64)
        nodes = [canvas.at(u + 0.13 * i, v + rng.uniform(-0.025, 0.025)) for i in range(4)]
        canvas.reflect(bezier(*nodes, n=10), rng.uniform(1.4, 2.6), 1.2)
    canvas.reflect(gland_top, 1.8, 1.2)
    muscle_top = lowered(gland_bottom, canvas.px(rng.uniform(7, 12)))
    muscle_bottom = canvas.curve(rng.uniform(0.87, 0.9), wave=0.006)
    muscle(canvas, muscle_top, muscle_bottom, -7.0, 4)
    canvas.band(muscle_bottom, canvas.curve(1.2), -13.0)
    spacing = rng.uniform(0.75, 1.0)
    first = rng.uniform(-1.0, -0.6)
    for u in (first, first + spacing, first + 2 * spacing):
        x, y = canvas.at(u, 0.955)
        bone(canvas, x, y, canvas.px(rng.uniform(20, 27)), canvas.px(rng.uniform(8, 12)))


def thyroid(canvas: Canvas) -> None:
    """One or two bright lobes beside the trachea with its shadow, carotid, strap muscles in front."""
    rng = canvas.rng
    canvas.echo_db[:] = -7.0
    canvas.texture(1.5, 9)
    skin(canvas, rng.uniform(0.03, 0.045))
    strap_top = canvas.curve(rng.uniform(0.08, 0.11), wave=0.004)
    strap_bottom = canvas.curve(rng.uniform(0.16, 0.2), sag=0.03, wave=0.006)
    deep = canvas.curve(rng.uniform(0.78, 0.82), wave=0.012)
    muscle(canvas, deep, canvas.curve(1.1), -9.0, 4, fascia=2.5)
    canvas.bed_db = 3.5
    both = rng.random() < 0.5
    lower = rng.uniform(0.44, 0.5)
    if both:
        u_trachea, lobes = rng.uniform(-0.06, 0.06), [(-1.0, rng.uniform(37, 42)), (1.0, rng.uniform(37, 42))]
    else:
        side = float(rng.choice((-1.0, 1.0)))
        u_trachea, lobes = -side * rng.uniform(0.55, 0.75), [(side, rng.uniform(46, 56))]
    tx, ty = canvas.at(u_trachea, lower - 0.02)
    tr = canvas.px(rng.uniform(20, 25))
    for side, width in lobes:
        half = canvas.px(width)
        x = tx + side * (tr * 0.8 + half)
        _, y = canvas.at(0, lower)
        height = canvas.px(rng.uniform(46, 54))
        lobe = canvas.blob(x, y, half, height, -side * rng.uniform(0.0, 0.2), 0.025)
        canvas.fill(lobe, 3.5)
        canvas.mark(lobe)
        canvas.texture(0.8, 14, [lobe])
        canvas.reflect(lobe, 2.4, 1.3, closed=True)
        cx = x + side * (half + canvas.px(14))
        r = canvas.px(rng.uniform(9, 11.5))
        carotid = canvas.blob(cx, y + canvas.px(rng.uniform(-6, 16)), r, r, 0, 0.02)
        canvas.fill(carotid, -36.0)
        canvas.reflect(carotid, 3.5, 1.8, closed=True)
    if both:  # the isthmus bridges the lobes over the trachea
        reach, rise = tr + canvas.px(12), ty - tr * 0.7
        isthmus = bezier((tx - reach, rise), (tx, ty - tr - canvas.px(14)), (tx + reach, rise))
        tube(canvas, isthmus, 3.5, 11, 1.5)
    t = np.linspace(np.pi * 1.02, np.pi * 1.98, 24)
    ring = np.stack([tx + tr * np.cos(t), ty + tr * np.sin(t)], axis=1)
    inside = np.concatenate([ring, lowered(ring, canvas.px(150))[::-1]])
    canvas.erase_reflectors(inside)
    canvas.fill(inside, -12.0, 14.0 / canvas.px(60))
    canvas.reflect(ring, 6.0, 2.6)
    for step in (9, 18, 27):  # air echoes the cartilage again and again
        canvas.reflect(lowered(ring[5:-5], canvas.px(step)), 5.0 / (1 + step / 9), 1.6)
    muscle(canvas, strap_top, strap_bottom, -9.0, 3, fascia=3.0)
    canvas.unmark(inside)
    canvas.unmark(np.concatenate([strap_top, strap_bottom[::-1]]))
