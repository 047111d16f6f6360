"""From a marked graph to one that a backend runs: all passes in their order, for a purpose and a plan.

optimum's ORTQuantizer is not used: it quantizes the outputs of products too, knows one scheme for a whole graph, and
reads weights that are all in memory.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from sonoedge.export.layout import Layout
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.passes.attach import AttachWeights
from sonoedge.export.passes.attention import AttendInPlace, AttendStandard
from sonoedge.export.passes.attention_tensorrt import AttendInBuffer
from sonoedge.export.passes.base import Pass, run_passes
from sonoedge.export.passes.dead_code import RemoveUnused
from sonoedge.export.passes.embeddings import LowerEmbeddings
from sonoedge.export.passes.emitter import CONTRIB
from sonoedge.export.passes.expert_plugins import Dispatch
from sonoedge.export.passes.lower_products import LowerProducts
from sonoedge.export.passes.norms import LowerNorms
from sonoedge.export.passes.probes import NameProbes
from sonoedge.export.passes.products import Purpose, opset
from sonoedge.export.plugins.dispatch import BLOCK_ROWS
from sonoedge.export.scheme import QuantizationPlan


def lowered(
    marked: ir.Model,
    config: ModelConfig,
    plan: QuantizationPlan,
    layout: Layout,
    weights: Path,
    purpose: Purpose,
    dispatch: Dispatch = Dispatch.FUNCTION,
    block_rows: int = BLOCK_ROWS[0],
) -> ir.Model:
    """A copy of the graph `marked` with every mark in operators for `purpose`, its weights in the file `weights`."""
    model = marked.clone()
    attention: dict[Purpose, Pass] = {
        Purpose.PORTABLE: AttendStandard(plan, config.head_dim),
        Purpose.TENSORRT: AttendInBuffer(config.head_dim),
    }
    run_passes(
        model,
        [
            NameProbes(),
            LowerEmbeddings(plan, purpose),
            LowerNorms(purpose),
            attention.get(purpose, AttendInPlace(plan)),
            LowerProducts(config, plan, layout, purpose, dispatch, block_rows),
            RemoveUnused(),
            AttachWeights(layout, weights),
        ],
    )
    model.opset_imports[""] = opset(purpose)
    model.opset_imports[DOMAIN] = 1
    if purpose in (Purpose.ROWS, Purpose.TOKEN):
        model.opset_imports[CONTRIB] = 1
    return model
