"""Writes the fidelity report: JSON for programs, one page for people."""

from __future__ import annotations

from pathlib import Path

from sonoedge.export.fidelity.cases import Cases
from sonoedge.export.fidelity.page import report_html
from sonoedge.export.fidelity.result import Fidelity, report_json

JSON_FILE = "reports/fidelity.json"
HTML_FILE = "reports/fidelity.html"


def write(fidelity: Fidelity, json_file: Path, html_file: Path, cases: Cases | None = None) -> None:
    """Write both; `cases` are those that were measured, for the pictures beside the worst answers.

    Raises SonoEdgeError when the report holds a number that is not finite.
    """
    json_file.write_bytes(report_json(fidelity))
    html_file.write_text(report_html(fidelity, cases), encoding="utf-8")
