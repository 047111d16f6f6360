"""Tables and figures of the fidelity page: every word that goes in is escaped here, and only here becomes markup."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


class Part(str):
    """The name of a row that details the one above it."""

    __slots__ = ()


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """A table of escaped cells; None says that nothing was measured."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    thead = f"<thead><tr>{head}</tr></thead>" if head else ""
    return Html(f'<div class="scroll"><table>{thead}<tbody>{body}</tbody></table></div>')


def figure(caption: str, chart: Html) -> Html:
    """A chart under its caption."""
    return Html(f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>")


def _cell(cell: object) -> str:
    if cell is None:
        return '<td class="muted">not measured</td>'
    kind = ' class="part"' if isinstance(cell, Part) else ""
    return f"<td{kind}>{escape(str(cell))}</td>"
