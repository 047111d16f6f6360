"""Writes a bundle's graphs: for ONNX Runtime and portable, all over one file of weights."""

from __future__ import annotations

import msgspec
import onnx_ir as ir

from sonoedge.bundle import BundleWriter, Graph, StageCost
from sonoedge.export.graphs import export_decoder, export_vision
from sonoedge.export.layout import EMBEDDING, Layout
from sonoedge.export.lowering import lowered
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.passes.expert_plugins import Dispatch
from sonoedge.export.passes.lower_products import has_kernels
from sonoedge.export.passes.products import Purpose
from sonoedge.export.plugins.dispatch import BLOCK_ROWS
from sonoedge.export.scheme import QuantizationPlan
from sonoedge.progress import track

WEIGHTS = "graphs/model.weights"


class Wanted(msgspec.Struct, frozen=True):
    """One graph of a bundle."""

    graph: Graph
    purpose: Purpose
    dispatch: Dispatch = Dispatch.FUNCTION


VISION = Wanted(Graph("vision", "ort", "graphs/vision.ort.onnx"), Purpose.ROWS)
DECODER = Wanted(Graph("decoder", "ort", "graphs/decoder.ort.onnx"), Purpose.ROWS)
DECODE = Wanted(Graph("decode", "ort", "graphs/decode.ort.onnx"), Purpose.TOKEN)
PORTABLE_VISION = Wanted(Graph("vision", "qdq", "graphs/vision.onnx"), Purpose.PORTABLE)
PORTABLE_DECODER = Wanted(Graph("decoder", "qdq", "graphs/decoder.onnx"), Purpose.PORTABLE)
TENSORRT_VISION = Wanted(Graph("vision", "trt", "graphs/vision.trt.onnx"), Purpose.TENSORRT)
TENSORRT_DECODER = Wanted(Graph("decoder", "trt", "graphs/decoder.trt.onnx"), Purpose.TENSORRT)
PLUGIN_DECODER = Wanted(
    Graph("decoder", "trt-plugins", "graphs/decoder.plugins.onnx"), Purpose.TENSORRT, Dispatch.GROUPED
)
PLUGIN_DECODE = Wanted(Graph("decode", "trt-plugins", "graphs/decode.plugins.onnx"), Purpose.TENSORRT, Dispatch.CHOSEN)


def write_graphs(
    config: ModelConfig,
    plan: QuantizationPlan,
    layout: Layout,
    context: int,
    writer: BundleWriter,
    *,
    two_forms: bool,
    block_rows: int | None,
) -> tuple[Graph, ...]:
    """Export and lower every graph; gives what the manifest lists.

    two_forms: a graph for one token at a time beside that for many; else one graph serves both. block_rows:
    tokens of one expert that plugins multiply together, None for a device without plugins. No weight is read: the
    graphs say where in the bundle's weights file they are.
    """
    weights = writer.add(WEIGHTS)
    wanted = [VISION, PORTABLE_VISION, DECODER, PORTABLE_DECODER, TENSORRT_VISION, TENSORRT_DECODER]
    wanted += [DECODE] if two_forms else []
    wanted += plugin_graphs(config, plan, two_forms=two_forms) if block_rows else []
    with track("export graphs", 2 + len(wanted)) as advance:
        marked = {"vision": export_vision(config)}
        advance(1, "vision")
        marked["decoder"] = export_decoder(config, context, plan.cache)
        advance(1, "decoder")
        for item in wanted:
            source = marked["vision" if item.graph.purpose == "vision" else "decoder"]
            rows = block_rows or BLOCK_ROWS[0]  # which graphs without plugins leave out
            model = lowered(source, config, plan, layout, weights, item.purpose, item.dispatch, rows)
            ir.save(model, writer.add(item.graph.path))
            advance(1, item.graph.path)
    return tuple(item.graph for item in wanted)


def plugin_graphs(config: ModelConfig, plan: QuantizationPlan, *, two_forms: bool) -> list[Wanted]:
    """The graphs in which plugins run some experts; none for a dense model or schemes without kernels."""
    schemes = [scheme for name, scheme in plan.schemes.items() if name.endswith(".moe.experts")]
    wanted = (PLUGIN_DECODER, PLUGIN_DECODE) if two_forms else (PLUGIN_DECODER,)
    return [item for item in wanted if any(has_kernels(item.dispatch, scheme, config) for scheme in schemes)]


def stage_costs(config: ModelConfig, layout: Layout) -> dict[str, StageCost]:
    """Bytes of weights that one run of each stage reads: every expert for many tokens, the chosen ones for one."""
    vision = decoder = experts = embeddings = 0
    for unit in layout.units:
        size = sum(part.length for part in unit.parts)
        name = unit.values.name
        if name.startswith("visual."):
            vision += size
            continue
        decoder += size
        if ".moe.experts." in name:
            experts += size
        elif name.startswith(EMBEDDING) and not config.tie_word_embeddings:
            embeddings += size
    decoder -= embeddings  # a row a token, which is nothing beside the rest
    unread = 0
    if config.moe is not None:
        unread = experts * (config.moe.num_experts - config.moe.num_experts_per_tok) // config.moe.num_experts
    return {
        "vision": StageCost(bytes=vision),
        "decoder": StageCost(bytes=decoder),
        "decode": StageCost(bytes=decoder - unread),
    }
