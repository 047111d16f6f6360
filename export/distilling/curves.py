"""The log of a training run, one JSON line a step, and one self-contained page of its curves."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import msgspec

from sonoedge.export.fidelity.markup import Html, figure, table
from sonoedge.export.fidelity.page import POLICY, STYLE
from sonoedge.export.fidelity.plots import BASE, PLOT_HEIGHT, WIDTH

LOG, PAGE = "log.jsonl", "curves.html"
POINTS = 320  # of a curve: more steps than that are averaged
LEFT, TOP = 60, 20


class Step(msgspec.Struct, frozen=True):
    """One step: every loss without its weight, and what they add up to with them."""

    step: int
    learning_rate: float
    total: float
    losses: dict[str, float]


class CurveLog:
    """Appends steps to a file, from the step on at which a run begins or goes on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Lines of steps from `first_step` on, which will be done again, are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._page = folder / LOG, folder / PAGE
        kept = [step for step in read_log(self._path) if step.step < first_step] if self._path.exists() else []
        partial = self._path.with_suffix(".partial")
        partial.write_bytes(b"".join(map(_line, kept)))
        partial.replace(self._path)
        self._file = self._path.open("ab")

    def add(self, step: Step) -> None:
        """Write one line."""
        self._file.write(_line(step))
        self._file.flush()

    def draw(self) -> None:
        """Write the page."""
        partial = self._page.with_suffix(".partial")
        partial.write_text(curves_html(read_log(self._path)), encoding="utf-8")
        partial.replace(self._page)

    def close(self) -> None:
        """End the log."""
        self._file.close()


def read_log(path: Path) -> list[Step]:
    """The steps of a log; a last line that a kill cut off is passed over."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [msgspec.json.decode(line, type=Step) for line in lines if line.endswith(b"\n")]


def curves_html(steps: Sequence[Step]) -> str:
    """The page: a chart for every loss, and the first and last values as a table."""
    names = list(dict.fromkeys(name for step in steps for name in step.losses))
    curves = {"total": [(step.step, step.total) for step in steps]}
    curves |= {name: [(s.step, s.losses[name]) for s in steps if name in s.losses] for name in names}
    rows = [(name, points[0][1], points[-1][1], min(v for _, v in points)) for name, points in curves.items() if points]
    worded = [(name, *(f"{value:.4g}" for value in values)) for name, *values in rows]
    parts = [
        f"<h1>Distillation</h1><p>{len(steps)} steps. Losses without their weights; the total has them.</p>",
        table(("loss", "first", "last", "least"), worded),
        *(figure(name, _curve(points, name)) for name, points in curves.items() if points),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Distillation</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _curve(points: Sequence[tuple[int, float]], name: str) -> Html:
    """A line through the points from 0 up, neighbours averaged where there are many."""
    width = -(-len(points) // POINTS)
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    means = [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]
    highest = max(value for _, value in means) or 1.0
    first, last = points[0][0], points[-1][0]
    across = (WIDTH - LEFT - TOP) / max(1, last - first)
    line = " ".join(
        f"{LEFT + (s - first) * across:.1f},{BASE - max(0.0, v) / highest * (BASE - TOP):.1f}" for s, v in means
    )
    labels = (
        f'<text class="name muted" x="{LEFT - 6}" y="{TOP + 4}">{highest:.3g}</text>'
        f'<text class="name muted" x="{LEFT - 6}" y="{BASE + 4}">0</text>'
        f'<text class="middle muted" x="{LEFT}" y="{BASE + 17}">{first}</text>'
        f'<text class="name muted" x="{WIDTH - TOP}" y="{BASE + 17}">{last}</text>'
    )
    return Html(
        f'<svg viewBox="0 0 {WIDTH} {PLOT_HEIGHT}" role="img" aria-label="{escape(name)}"><title>{escape(name)}</title>'
        f'<line class="axis" x1="{LEFT}" y1="{BASE}" x2="{WIDTH - TOP}" y2="{BASE}"/>'
        f'<polyline class="line" points="{line}"/>{labels}</svg>'
    )


def _line(step: Step) -> bytes:
    return msgspec.json.encode(step) + b"\n"
