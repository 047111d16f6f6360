"""The build's last question: does the INT8 bundle still answer as the float model does? Its report, and its floors."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import msgspec

from sonoedge.bundle import BundleWriter, HintCalibration
from sonoedge.errors import SonoEdgeError
from sonoedge.export.bundle_graphs import DECODER
from sonoedge.export.fake_quant import fake_quantized
from sonoedge.export.fidelity.cases import Cases
from sonoedge.export.fidelity.measure import Variant, measure
from sonoedge.export.fidelity.page import report_html
from sonoedge.export.fidelity.probes import OrtProbe
from sonoedge.export.fidelity.result import Fidelity, missed, report_json
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.quantizing import Quantized
from sonoedge.export.recipe import Fidelity as Settings
from sonoedge.export.scheme import CacheScheme, Scheme
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

SHIPPED, CACHE_ALONE = "int8 bundle", "float with the int8 cache alone"
FOLDER = "reports"
FLOORS = ("least_top1", "least_answers", "least_router", "largest_kl", "largest_bleu1_drop", "largest_rouge1_drop")


def has_floors(settings: Settings) -> bool:
    """Whether a build can fail by them."""
    return any(getattr(settings, name) is not None for name in FLOORS)


def compare_with_float(
    checkpoint: Path,
    made: Quantized,
    session: Session,
    hints: dict[str, HintCalibration],
    tokenizer: Tokenizer,
    cases: Cases,
    writer: BundleWriter,
) -> Fidelity:
    """Measure the session that will serve against the float `checkpoint` on `cases`; an int8 cache alone as well."""
    context = session.spec.context
    reference = TorchSession(load_checkpoint(checkpoint), session.image, context)
    probe = OrtProbe(writer.add(DECODER.graph.path), threads=2)
    variants = {SHIPPED: Variant(session, probe, hints)}
    with contextlib.ExitStack() as stack:
        stack.callback(probe.close)
        if made.plan.cache is CacheScheme.INT8:
            alone = load_checkpoint(checkpoint)
            plan = msgspec.structs.replace(made.plan, schemes=dict.fromkeys(made.plan.schemes, Scheme.FLOAT))
            stack.enter_context(fake_quantized(alone, plan))
            variants[CACHE_ALONE] = Variant(TorchSession(alone, session.image, context))
        found = measure(reference, variants, tokenizer, cases)
    return msgspec.structs.replace(
        found,
        search=made.trace,
        schemes=dict(made.plan.schemes),
        routing=made.table.routing_rows(),
    )


def write_reports(
    fidelity: Fidelity,
    settings: Settings,
    cases: Cases,
    writer: BundleWriter,
    *,
    gated: bool,
    name: str = "fidelity",
    way_out: str = "give wider schemes, [search] or [qat], or lower the floor",
) -> tuple[str, ...] | None:
    """Write `reports/NAME.json` and `.html` and return the floors that are missed, None when the recipe has none.

    gated: a build below a floor fails. Raises SonoEdgeError naming what is missed and the way out, with the reports
    left beside the bundle that is not made.
    """
    faults = missed(fidelity, settings) if has_floors(settings) else None
    told = msgspec.structs.replace(fidelity, missed=faults)
    page, data = writer.add(f"{FOLDER}/{name}.html"), writer.add(f"{FOLDER}/{name}.json")
    data.write_bytes(report_json(told))
    page.write_text(report_html(told, cases), encoding="utf-8")
    if faults and gated:
        kept = writer.out.with_name(f"{writer.out.name}.{FOLDER}")
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(page.parent, kept)
        raise SonoEdgeError(
            f"the bundle is below the floors of its recipe: {'; '.join(faults)}: see {kept / page.name}, then {way_out}"
        )
    return faults
