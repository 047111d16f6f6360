"""Two regions that no model here is trained on: what they show must end in abstention."""

import numpy as np

from sonoedge.calibration.phantom.anatomy.layers import bezier, bone, muscle, skin
from sonoedge.calibration.phantom.canvas import Canvas, lowered


def lung(canvas: Canvas) -> None:
    """Ribs with shadows, the bright pleural line between them, its repeats as A-lines."""
    rng = canvas.rng
    canvas.echo_db[:] = -10.0
    canvas.texture(1.5, 8)
    skin(canvas, 0.04)
    height = rng.uniform(0.22, 0.27)
    pleura = canvas.curve(height, wave=0.004)
    muscle(canvas, canvas.curve(0.09), lowered(pleura, -canvas.px(2)), -6.0, 4)
    canvas.mark(canvas.band(pleura, canvas.curve(1.2), -12.0, 0.03))
    canvas.bed_db = -3.0
    for repeat in range(1, 5):
        canvas.reflect(lowered(pleura, (repeat - 1) * canvas.px(height * 200)), 7.0 / repeat, 2.6)
    for _ in range(int(rng.integers(0, 4))):  # comet tails
        x, y = canvas.at(rng.uniform(-0.5, 0.5), height)
        canvas.stroke(np.array([[x, y], [x + rng.uniform(-3, 3), y + canvas.px(150)]]), -2.0, 3)
    for u in (rng.uniform(-0.85, -0.6), rng.uniform(0.6, 0.85)):
        x, y = canvas.at(u, height - 0.03)
        bone(canvas, x, y, canvas.px(24), canvas.px(11))


def musculoskeletal(canvas: Canvas) -> None:
    """Striated muscle bellies between fascias over a bright bone surface with nothing behind it."""
    rng = canvas.rng
    canvas.echo_db[:] = -8.0
    skin(canvas, 0.04)
    tilt = rng.uniform(-0.06, 0.06)
    first = canvas.curve(rng.uniform(0.12, 0.16), wave=0.006)
    second = canvas.curve(rng.uniform(0.38, 0.44), wave=0.008, tilt=tilt)
    third = canvas.curve(rng.uniform(0.72, 0.78), sag=rng.uniform(-0.05, 0.05), wave=0.01)
    canvas.mark(muscle(canvas, first, second, -8.0, 4, fascia=5.0))
    canvas.mark(muscle(canvas, second, third, -8.0, 4, fascia=5.0))
    slope = rng.uniform(0.1, 0.25) * float(rng.choice((-1.0, 1.0)))
    for _ in range(60):
        u, v = rng.uniform(-1, 1), rng.uniform(0.16, 0.72)
        a, b = canvas.at(u, v), canvas.at(u + 0.22, v + 0.22 * slope)
        canvas.reflect(bezier(a, b, n=3), rng.uniform(1.2, 2.4), 1.2)
    canvas.bed_db = -1.0
    canvas.band(third, canvas.curve(1.3), -30.0, 0.5)
    canvas.reflect(third, 8.5, 3.0)
