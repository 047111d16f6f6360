"""Heart and large vessels."""

import numpy as np

from sonoedge.calibration.phantom.anatomy.layers import bezier, muscle, skin
from sonoedge.calibration.phantom.canvas import Canvas, lowered

_BLOOD_DB = -27.0


def heart(canvas: Canvas) -> None:
    """Apical four chambers or the parasternal long axis: bright myocardium and valves around dark cavities."""
    rng = canvas.rng
    canvas.echo_db[:] = -11.0
    canvas.texture(2.5, 9)
    canvas.bed_db = 2.0
    canvas.cavities, canvas.largest_lesion, canvas.bed_px = True, 24.0, 11.0
    skin(canvas, 0.04)
    if rng.random() < 0.6:
        _apical(canvas)
    else:
        _parasternal(canvas)


def _apical(canvas: Canvas) -> None:
    rng = canvas.rng
    flip = float(rng.choice((-1.0, 1.0)))
    x, y = canvas.at(rng.uniform(-0.05, 0.05), rng.uniform(0.52, 0.56))
    rx, ry = canvas.px(rng.uniform(76, 86)), canvas.px(rng.uniform(88, 96))
    tilt = rng.uniform(-0.12, 0.12)
    outer = canvas.blob(x, y, rx, ry, 0.0, 0.02)
    narrow = 0.84 + 0.16 * (outer[:, 1] - y) / ry  # the apex points at the probe
    outer[:, 0] = x + (outer[:, 0] - x) * narrow
    c, s = np.cos(tilt), np.sin(tilt)
    outer = (outer - (x, y)) @ np.array([[c, s], [-s, c]]) + (x, y)
    canvas.fill(outer, 2.0)
    canvas.mark(outer)
    canvas.texture(1.6, 20, [outer])
    canvas.reflect(outer, 2.6, 1.7, closed=True)

    def spot(dx: float, dy: float) -> tuple[float, float]:
        return x + c * dx * rx - s * dy * ry, y + s * dx * rx + c * dy * ry

    chambers = (  # left ventricle, right ventricle, left atrium, right atrium
        (0.30, -0.22, 0.30, 0.47),
        (-0.36, -0.12, 0.24, 0.38),
        (0.34, 0.57, 0.31, 0.26),
        (-0.36, 0.56, 0.29, 0.25),
    )
    for dx, dy, wx, wy in chambers:
        cx, cy = spot(flip * dx, dy)
        width, height = wx * rx * rng.uniform(0.88, 1.05), wy * ry * rng.uniform(0.88, 1.05)
        cavity = canvas.blob(cx, cy, width, height, tilt, 0.06)
        canvas.fill(cavity, _BLOOD_DB)
        canvas.reflect(cavity, 1.1, 1.3, closed=True)
    opening = rng.uniform(0.05, 0.14)
    for dx, half in ((0.31, 0.27), (-0.36, 0.22)):  # mitral and tricuspid leaflets
        for side in (-1, 1):
            hinge, tip = spot(flip * (dx + side * half), 0.26), spot(flip * (dx + side * opening), 0.06)
            canvas.reflect(bezier(hinge, spot(flip * (dx + side * half * 0.7), 0.14), tip, n=8), 4.5, 1.8)
    canvas.pulse = (*spot(flip * 0.2, -0.1), 0.62 * ry)


def _parasternal(canvas: Canvas) -> None:
    rng = canvas.rng
    flip = float(rng.choice((-1.0, 1.0)))
    x, y = canvas.at(rng.uniform(-0.05, 0.05), rng.uniform(0.5, 0.54))
    rx, ry = canvas.px(rng.uniform(88, 98)), canvas.px(rng.uniform(72, 80))
    tilt = flip * rng.uniform(-0.25, -0.1)
    outer = canvas.blob(x, y, rx, ry, tilt, 0.02)
    canvas.fill(outer, 2.0)
    canvas.mark(outer)
    canvas.texture(1.2, 20, [outer])
    canvas.reflect(outer, 2.6, 1.7, closed=True)
    c, s = np.cos(tilt), np.sin(tilt)

    def spot(dx: float, dy: float) -> tuple[float, float]:
        return x + c * flip * dx * rx - s * dy * ry, y + s * flip * dx * rx + c * dy * ry

    for dx, dy, wx, wy in (
        (-0.3, 0.12, 0.5, 0.33),
        (0.1, -0.66, 0.62, 0.17),
        (0.56, 0.34, 0.27, 0.27),
        (0.62, -0.14, 0.34, 0.15),
    ):
        cx, cy = spot(dx, dy)
        cavity = canvas.blob(cx, cy, wx * rx, wy * ry, tilt, 0.05)
        canvas.fill(cavity, _BLOOD_DB)
        canvas.reflect(cavity, 1.1, 1.3, closed=True)
    leaf = bezier(spot(0.3, 0.05), spot(0.05, 0.02), spot(-0.02, 0.2), n=10)
    canvas.reflect(leaf, 6.0, 2.4)
    canvas.reflect(bezier(spot(0.28, 0.42), spot(0.1, 0.4), spot(0.02, 0.28), n=8), 6.0, 2.4)
    canvas.reflect(bezier(spot(0.4, -0.24), spot(0.5, -0.14), spot(0.42, -0.04), n=8), 5.0, 2.0)
    canvas.pulse = (*spot(-0.2, 0.1), 0.65 * rx)


def vessel(canvas: Canvas) -> None:
    """A large artery along or across the plane, with bright walls and the double line of the intima."""
    rng = canvas.rng
    canvas.echo_db[:] = -4.0
    canvas.texture(2.0, 10)
    skin(canvas, rng.uniform(0.03, 0.05))
    muscle(canvas, canvas.curve(rng.uniform(0.08, 0.1)), canvas.curve(rng.uniform(0.16, 0.2), wave=0.006), -8.0, 3)
    canvas.bed_db = 0.0
    canvas.cavities, canvas.largest_lesion, canvas.bed_px = True, 25.0, 8.0
    if rng.random() < 0.6:
        _along(canvas)
    else:
        _across(canvas)


def _along(canvas: Canvas) -> None:
    rng = canvas.rng
    tilt = rng.uniform(-0.09, 0.09)
    centre = rng.uniform(0.48, 0.54)
    half = rng.uniform(0.15, 0.18)
    upper, lower = canvas.curve(centre - half, 0, 0.006, tilt), canvas.curve(centre + half, 0, 0.006, tilt)
    wall = canvas.px(rng.uniform(5, 7))
    outer = canvas.band(lowered(upper, -2 * wall), lowered(lower, 2 * wall), 4.0)
    canvas.mark(outer)
    canvas.band(upper, lower, _BLOOD_DB)
    canvas.band(lowered(upper, -wall), upper, -14.0)
    canvas.band(lower, lowered(lower, wall), -14.0)
    canvas.reflect(lowered(upper, -wall), 6.0, 2.2)
    canvas.reflect(lowered(lower, wall), 6.5, 2.2)
    canvas.reflect(upper, 3.0, 1.3)
    canvas.reflect(lower, 3.6, 1.3)
    x, y = canvas.at(0, centre)
    canvas.pulse = (x, y, canvas.px(95))


def _across(canvas: Canvas) -> None:
    rng = canvas.rng
    side = float(rng.choice((-1.0, 1.0)))
    x, y = canvas.at(-side * rng.uniform(0.06, 0.16), rng.uniform(0.48, 0.54))
    r = canvas.px(rng.uniform(46, 54))
    wall = canvas.px(rng.uniform(5, 7))
    vein = canvas.blob(
        x + side * (r + canvas.px(30)),
        y - canvas.px(rng.uniform(0, 20)),
        canvas.px(22),
        canvas.px(11),
        side * 0.4,
        0.06,
    )
    canvas.fill(vein, -30.0)
    canvas.reflect(vein, 2.0, 1.2, closed=True)
    outer = canvas.blob(x, y, r + 2 * wall, r + 2 * wall, 0, 0.01)
    canvas.fill(outer, 4.0)
    canvas.mark(outer)
    media, lumen = canvas.blob(x, y, r + wall, r + wall, 0, 0.01), canvas.blob(x, y, r, r, 0, 0.01)
    canvas.fill(media, -14.0)
    canvas.fill(lumen, _BLOOD_DB)
    canvas.reflect(media, 6.0, 2.2, closed=True)
    canvas.reflect(lumen, 3.2, 1.3, closed=True)
    canvas.pulse = (x, y, canvas.px(70))
