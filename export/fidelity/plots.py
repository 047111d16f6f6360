"""Small charts as inline SVG that reads the page's own colours: bars by name, a histogram, a line of steps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sonoedge.export.fidelity.markup import Html

WIDTH = 640
ROW = 22
LETTER = 7.2  # width of a letter, at most
LETTERS = 34  # of a name; longer ones lose their beginning
VALUE = 70  # room for numbers on the right
PLOT_HEIGHT = 190
BASE = 160  # y of the horizontal axis in charts with columns or lines


def bars(rows: Sequence[tuple[str, float, str]], title: str) -> Html:
    """Horizontal bars from 0: each row's name, length, and the words at its end; wide names are shortened."""
    longest = max((value for _, value, _ in rows), default=0) or 1
    left = round(LETTER * min(LETTERS, max((len(name) for name, _, _ in rows), default=0))) + 12
    drawn = []
    for index, (name, value, words) in enumerate(rows):
        y = index * ROW
        width = max(0.0, value) / longest * (WIDTH - left - VALUE)
        short = name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"
        drawn.append(
            f'<g><title>{escape(name)}: {escape(words)}</title><rect class="hit" y="{y}" width="{WIDTH}" '
            f'height="{ROW}"/><text class="name" x="{left - 8}" y="{y + 15}">{escape(short)}</text>'
            f'<rect class="mark" x="{left}" y="{y + 4}" width="{width:.1f}" height="{ROW - 8}" rx="2"/>'
            f'<text x="{left + width + 6:.1f}" y="{y + 15}">{escape(words)}</text></g>'
        )
    axis = f'<line class="axis" x1="{left}" y1="0" x2="{left}" y2="{len(rows) * ROW}"/>'
    return _chart("".join(drawn) + axis, len(rows) * ROW, title)


def columns(counts: Sequence[int], edges: Sequence[str], title: str) -> Html:
    """A histogram: the count over every column, the words of `edges`, one more than columns, under the gaps."""
    step = (WIDTH - 40) / max(1, len(counts))
    tallest = max(counts, default=0) or 1
    drawn = []
    for index, count in enumerate(counts):
        x, height = 20 + index * step, count / tallest * (BASE - 24)
        drawn.append(
            f"<g><title>{escape(edges[index])} to {escape(edges[index + 1])}: {count}</title>"
            f'<rect class="hit" x="{x:.1f}" width="{step:.1f}" height="{BASE}"/>'
            f'<rect class="mark" x="{x + 1:.1f}" y="{BASE - height:.1f}" width="{step - 2:.1f}" height="{height:.1f}"/>'
            f'<text class="middle" x="{x + step / 2:.1f}" y="{BASE - height - 5:.1f}">{count}</text></g>'
        )
    labels = [
        f'<text class="middle muted" x="{20 + index * step:.1f}" y="{BASE + 17}">{escape(edge)}</text>'
        for index, edge in enumerate(edges)
    ]
    axis = f'<line class="axis" x1="20" y1="{BASE}" x2="{WIDTH - 20}" y2="{BASE}"/>'
    return _chart("".join(drawn) + axis + "".join(labels), PLOT_HEIGHT, title)


def steps(values: Sequence[tuple[str, float]], title: str) -> Html:
    """A line through values from 0 up, evenly spaced; each point's name and value show on hover and at both ends."""
    highest = max((value for _, value in values), default=0) or 1
    gap = (WIDTH - 120) / max(1, len(values) - 1)
    points = [(60 + index * gap, BASE - value / highest * (BASE - 30)) for index, (_, value) in enumerate(values)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    drawn = [f'<polyline class="line" points="{line}"/>']
    for index, ((name, value), (x, y)) in enumerate(zip(values, points, strict=True)):
        ends = index in (0, len(values) - 1)
        words = f'<text class="middle" x="{x:.1f}" y="{y - 10:.1f}">{value:.2g}</text>' if ends else ""
        drawn.append(
            f"<g><title>{escape(name)}: {value:.4g}</title>"
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>{words}</g>'
            f'<text class="middle muted" x="{x:.1f}" y="{BASE + 17}">{index}</text>'
        )
    axis = f'<line class="axis" x1="40" y1="{BASE}" x2="{WIDTH - 40}" y2="{BASE}"/>'
    return _chart(axis + "".join(drawn), PLOT_HEIGHT, title)


def _chart(inside: str, height: int, title: str) -> Html:
    return Html(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{inside}</svg>"
    )
