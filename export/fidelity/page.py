"""`reports/fidelity.html`: one self-contained page; whatever a model said is shown as text, never as markup."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity import build_sections, sections
from sonoedge.export.fidelity.cases import Cases
from sonoedge.export.fidelity.markup import Html
from sonoedge.export.fidelity.preset import preset_section
from sonoedge.export.fidelity.result import Fidelity

PICTURE_PX = 320  # the longer side of a picture on the page, at most
# Nothing is fetched and nothing runs, whatever text the page may hold.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #5c6675; --page: #fbfbfa; --card: #ffffff; --rule: #dfe3e8;
  --mark: #2a6fc9; --good: #1b7a43; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --muted: #9aa5b4; --page: #14181e; --card: #1c222b;
  --rule: #323b47; --mark: #6ba6f0; --good: #62c58b; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; } p { margin: .4rem 0; }
.muted, figcaption { color: var(--muted); } small { color: var(--muted); }
.verdict { border-left: 4px solid var(--good); background: var(--card); padding: .6rem 1rem; margin: 1rem 0; }
.verdict.missed { border-color: var(--bad); } .verdict ul { margin: .2rem 0; padding-left: 1.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; background: var(--card); }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--rule); vertical-align: top;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { color: var(--muted); font-weight: 600; }
td.part:first-child { padding-left: 1.8rem; color: var(--muted); }
figure { margin: 1rem 0; background: var(--card); border: 1px solid var(--rule); border-radius: 6px; padding: .8rem; }
figcaption { margin-bottom: .5rem; } svg { width: 100%; height: auto; display: block; }
svg text { font-size: 12px; fill: var(--ink); } svg .name { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .muted { fill: var(--muted); } svg .mark { fill: var(--mark); } svg .axis { stroke: var(--rule); }
svg .hit { fill: transparent; } svg .line { fill: none; stroke: var(--mark); stroke-width: 2; }
.case { display: flex; gap: 1rem; background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: .8rem; margin: .8rem 0; flex-wrap: wrap; } .case img { width: 168px; height: auto; border-radius: 4px; }
.case .images { display: flex; flex-direction: column; gap: .4rem; } .case .said { flex: 1 1 24rem; min-width: 0; }
.case h3 { font-size: 1rem; margin: 0 0 .3rem; } .case table { background: none; }
.case td { text-align: left; overflow-wrap: anywhere; } .case td:first-child { white-space: nowrap; width: 7rem; }
.differ { color: var(--bad); font-weight: 600; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--muted); }
"""


def report_html(fidelity: Fidelity, cases: Cases | None = None) -> str:
    """The page; `cases` are those that were measured and give the pictures beside the worst answers."""
    pictures = {} if cases is None else {worst.case: _pictures(cases, worst.case) for worst in fidelity.worst}
    parts = (
        sections.opening(fidelity),
        Html("") if fidelity.preset is None else preset_section(fidelity.preset),
        sections.agreement(fidelity),
        sections.texts(fidelity),
        sections.layers(fidelity),
        sections.divergence(fidelity),
        sections.confidence(fidelity),
        sections.worst(fidelity, pictures),
        build_sections.search(fidelity),
        build_sections.schemes(fidelity),
        build_sections.routing(fidelity),
    )
    return document(f"Fidelity of {fidelity.shipped}", parts)


def document(title: str, parts: Sequence[Html], style: str = "") -> str:
    """A whole page of sections; `style` adds to the pages' own."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body>\n</html>\n"
    )


def inline_picture(image: npt.NDArray[np.uint8], name: str) -> Html:
    """A picture [H, W, 3], small, inside the page itself; raises SonoEdgeError when it cannot be encoded."""
    height, width = image.shape[:2]
    scale = min(1.0, PICTURE_PX / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    done, png = cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    if not done:
        raise SonoEdgeError(f"{name}: a picture cannot be encoded as PNG: reinstall opencv")
    data = base64.b64encode(png.tobytes()).decode()
    return Html(f'<img src="data:image/png;base64,{data}" alt="{escape(name)}">')


def _pictures(cases: Cases, index: int) -> Sequence[Html]:
    """The pictures of a case."""
    case = cases[index]
    return [inline_picture(image, case.name) for image in case.images]
