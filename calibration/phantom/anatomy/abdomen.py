"""Liver, kidney and the female pelvis."""

import numpy as np

from sonoedge.calibration.phantom.anatomy.layers import bezier, muscle, tube
from sonoedge.calibration.phantom.canvas import Canvas, lowered


def liver(canvas: Canvas) -> None:
    """Even parenchyma, veins without walls, portal branches with bright walls, the diaphragm's arc."""
    rng = canvas.rng
    canvas.echo_db[:] = 0.0
    canvas.texture(0.9, 10)
    canvas.bed_db = 0.0
    capsule = canvas.curve(rng.uniform(0.1, 0.14), wave=0.006)
    side = float(rng.choice((-1.0, 1.0)))
    u = np.linspace(-1.2, 1.2, 33)
    v = rng.uniform(0.84, 0.9) - rng.uniform(0.06, 0.16) * np.clip(side * u - rng.uniform(-0.3, 0.1), -1.2, 2) ** 2
    diaphragm = np.array([canvas.at(a, b) for a, b in zip(u, v, strict=True)])
    outline = np.concatenate([capsule, diaphragm[::-1]])
    canvas.mark(outline)
    hub = canvas.at(rng.uniform(-0.15, 0.15) + side * 0.2, rng.uniform(0.68, 0.76))
    for _ in range(int(rng.integers(2, 4))):  # hepatic veins converge towards the diaphragm
        far = canvas.at(rng.uniform(-0.9, 0.9), rng.uniform(0.2, 0.45))
        bend = canvas.at(rng.uniform(-0.5, 0.5), rng.uniform(0.4, 0.6))
        vein = bezier(hub, bend, far)
        canvas.stroke(vein[:12], -22.0, rng.uniform(7, 9))
        canvas.stroke(vein[11:], -20.0, rng.uniform(4, 6))
    for _ in range(int(rng.integers(2, 5))):  # portal branches
        u0, v0 = rng.uniform(-0.7, 0.7), rng.uniform(0.25, 0.65)
        du, dv = rng.uniform(-0.45, 0.45), rng.uniform(-0.12, 0.12)
        branch = bezier(canvas.at(u0, v0), canvas.at(u0 + du * 0.6, v0 + dv * 0.2), canvas.at(u0 + du, v0 + dv), n=14)
        tube(canvas, branch, -20.0, rng.uniform(4, 6.5), 4.0)
    canvas.band(diaphragm, lowered(diaphragm, 2.0 * canvas.size), -14.0)
    canvas.reflect(diaphragm, 8.0, 3.0)
    muscle(canvas, canvas.curve(-0.02), capsule, -5.0, 4, fascia=2.8)


def kidney(canvas: Canvas) -> None:
    """A bean with a bright sinus, dark pyramids around it, cortex and capsule, in bright fat."""
    rng = canvas.rng
    canvas.echo_db[:] = rng.uniform(2.0, 4.0)
    canvas.texture(2.0, 9)
    top = canvas.curve(rng.uniform(0.1, 0.16), sag=rng.uniform(-0.04, 0.04), wave=0.008)
    muscle(canvas, canvas.curve(-0.02), top, -6.0, 4, fascia=3.0)
    x, y = canvas.at(rng.uniform(-0.06, 0.06), rng.uniform(0.48, 0.54))
    rx, ry = canvas.px(rng.uniform(84, 96)), canvas.px(rng.uniform(54, 62))
    angle = rng.uniform(-0.3, 0.3)
    bean = canvas.blob(x, y, rx, ry, angle, 0.015)
    rim = canvas.blob(x, y, rx * 1.07, ry * 1.1, angle, 0.02)
    canvas.fill(rim, 7.0)  # perirenal fat
    canvas.fill(bean, -6.0)
    canvas.mark(bean)
    canvas.texture(0.8, 12, [bean])
    canvas.bed_db = -3.0
    canvas.reflect(bean, 3.2, 1.4, closed=True)
    sx, sy = rx * 0.52, ry * 0.34
    c, s = np.cos(angle), np.sin(angle)
    for t in np.arange(0, 2 * np.pi, 2 * np.pi / int(rng.integers(9, 12))) + rng.uniform(0, 1):
        ax, ay = sx * 1.28 * np.cos(t), sy * 1.62 * np.sin(t)
        pyramid = canvas.blob(x + c * ax - s * ay, y + s * ax + c * ay, canvas.px(8), canvas.px(5.5), t, 0.1)
        canvas.fill(pyramid, -15.0)
    sinus = canvas.blob(x, y, sx, sy, angle, 0.09)
    canvas.fill(sinus, 10.0)
    canvas.texture(2.5, 30, [sinus])
    for _ in range(int(rng.integers(2, 5))):  # calyces and vessels part the sinus
        a = canvas.blob(
            x + rng.uniform(-0.6, 0.6) * sx, y + rng.uniform(-0.3, 0.3) * sy, canvas.px(6), canvas.px(2.5), angle
        )
        canvas.fill(a, -10.0)


def gynaecology(canvas: Canvas) -> None:
    """The bladder as a window, below it the uterus with its bright stripe, an ovary with small follicles."""
    rng = canvas.rng
    canvas.echo_db[:] = 1.0
    canvas.texture(2.4, 11)
    muscle(canvas, canvas.curve(-0.02), canvas.curve(rng.uniform(0.06, 0.09), wave=0.004), -4.0, 2, fascia=2.5)
    bx, by = canvas.at(rng.uniform(-0.12, 0.12), rng.uniform(0.16, 0.2))
    flip = float(rng.choice((-1.0, 1.0)))
    ux, uy = bx - flip * canvas.px(rng.uniform(10, 20)), canvas.at(0, rng.uniform(0.56, 0.62))[1]
    rx, ry = canvas.px(rng.uniform(74, 84)), canvas.px(rng.uniform(44, 52))
    angle = flip * rng.uniform(0.05, 0.25)
    uterus = canvas.blob(ux, uy, rx, ry, angle, 0.03)
    bladder = canvas.blob(
        bx, by, canvas.px(rng.uniform(58, 76)), canvas.px(rng.uniform(15, 20)), rng.uniform(-0.1, 0.1), 0.05
    )
    canvas.fill(bladder, -42.0, -0.06 / canvas.scale)
    canvas.reflect(bladder, 2.4, 1.5, closed=True)
    canvas.fill(uterus, -3.5)
    canvas.mark(uterus)
    canvas.texture(1.2, 16, [uterus])
    canvas.bed_db = -2.0
    canvas.reflect(uterus, 1.6, 1.4, closed=True)
    c, s = np.cos(angle), np.sin(angle)
    inner = canvas.blob(ux - flip * c * rx * 0.12, uy - flip * s * rx * 0.12, rx * 0.6, canvas.px(9), angle, 0.05)
    canvas.fill(inner, -11.0)  # the inner muscle layer is a dark rim around the stripe
    stripe = canvas.blob(
        ux - flip * c * rx * 0.12, uy - flip * s * rx * 0.12, rx * 0.54, canvas.px(rng.uniform(4, 5.5)), angle, 0.05
    )
    canvas.fill(stripe, 10.0)
    ox, oy = ux + flip * (rx + canvas.px(14)), uy + canvas.px(rng.uniform(-14, 22))
    ovary = canvas.blob(
        ox, oy, canvas.px(rng.uniform(20, 25)), canvas.px(rng.uniform(15, 19)), rng.uniform(-0.4, 0.4), 0.04
    )
    canvas.fill(ovary, -5.0)
    canvas.reflect(ovary, 1.8, 1.2, closed=True)
    for t in np.arange(0, 2 * np.pi, 1.05) + rng.uniform(0, 1):
        r = canvas.px(rng.uniform(2.5, 4.6))
        follicle = canvas.blob(ox + canvas.px(13) * np.cos(t), oy + canvas.px(9) * np.sin(t), r, r, 0, 0.03)
        canvas.fill(follicle, -32.0)
    gut = canvas.curve(rng.uniform(0.88, 0.93), wave=0.02)
    canvas.reflect(gut, 3.5, 2.5)
    canvas.band(gut, canvas.curve(1.3), -8.0, 0.1)
