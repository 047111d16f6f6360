"""The sections of the fidelity page that show what the build decided and calibration saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from html import escape

from sonoedge.calibration.table import ALL_REGIONS, RoutingRow
from sonoedge.export.fidelity import plots
from sonoedge.export.fidelity.markup import Html, figure, table
from sonoedge.export.fidelity.result import Fidelity

SHOWN = 40  # blocks in the chart of the search


def search(fidelity: Fidelity) -> Html:
    """The sensitivity search: each block alone, and the moves that were made."""
    trace = fidelity.search
    if trace is None:
        return Html("")
    alone = sorted(((block, found.kl) for block, found in trace.alone.items()), key=lambda item: -item[1])[:SHOWN]
    caption = f"KL with one block quantized alone, nats; the {len(alone)} worst of {len(trace.alone)} blocks"
    drawn: str = figure(caption, plots.bars([(block, kl, f"{kl:.2g}") for block, kl in alone], caption))
    if trace.moves:
        walked = [("start", trace.start.kl), *((move.block, move.after.kl) for move in trace.moves)]
        caption = "KL of the whole plan after every move, nats"
        drawn += figure(caption, plots.steps(walked, caption))
        rows = [
            [
                f"{number}. {move.block}",
                move.source.value,
                move.target.value,
                f"{move.before.kl:.3g}",
                f"{move.after.kl:.3g}",
                f"{move.weight_bytes / 1e6:,.1f} MB",
            ]
            for number, move in enumerate(trace.moves, 1)
        ]
        drawn += table(["move", "from", "to", "KL before", "KL after", "weights"], rows)
    ended = "the floor is met" if trace.met else f"the floor is missed: {'; '.join(trace.missed)}"
    budget = "no memory budget" if trace.budget_bytes is None else f"a budget of {trace.budget_bytes / 1e6:,.1f} MB"
    words = f"{len(trace.moves)} moves, weights of {trace.weight_bytes / 1e6:,.1f} MB, {budget}; {ended}."
    return Html(f"<h2>Sensitivity search</h2><p>{escape(words)}</p>{drawn}")


def schemes(fidelity: Fidelity) -> Html:
    """How many products each scheme has, and which."""
    if not fidelity.schemes:
        return Html("")
    counts = Counter(scheme.value for scheme in fidelity.schemes.values())
    counted = table(["scheme", "products"], [[scheme, count] for scheme, count in counts.most_common()])
    listed = table(["product", "scheme"], [[name, scheme.value] for name, scheme in fidelity.schemes.items()])
    return Html(f"<h2>Schemes</h2>{counted}<details><summary>Every product</summary>{listed}</details>")


def routing(fidelity: Fidelity) -> Html:
    """The experts that calibration's tokens went to."""
    if not fidelity.routing:
        return Html("")
    regions = sorted({row.region for row in fidelity.routing} - {ALL_REGIONS})
    whole = _routing_table(row for row in fidelity.routing if row.region == ALL_REGIONS)
    parts = "".join(
        f"<details><summary>{escape(region)}</summary>"
        f"{_routing_table(row for row in fidelity.routing if row.region == region)}</details>"
        for region in regions
    )
    return Html(f"<h2>Routing in calibration</h2>{whole}{parts}")


def _routing_table(rows: Iterable[RoutingRow]) -> Html:
    held = list(rows)
    experts = max((len(row.tokens) for row in held), default=0)
    body = [[row.mixture, f"{sum(row.tokens):,}", *(f"{100 * share:.1f} %" for share in row.shares)] for row in held]
    return table(["mixture", "choices", *(f"expert {index}" for index in range(experts))], body)
