"""Writes a bundle's graphs: vision, the decoder for ONNX Runtime and the portable one, over one file of weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from sonoedge.bundle import BundleWriter, Graph, StageCost
from sonoedge.export.graphs import Attention, export_decoder, export_vision
from sonoedge.export.lowering import QuantizationPlan, lower
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.progress import track

VISION, DECODER_ORT, DECODER_QDQ = "graphs/vision.onnx", "graphs/decoder.ort.onnx", "graphs/decoder.onnx"
WEIGHTS = "decoder.weights"  # beside the graphs, shared by both decoders
EXTERNAL_BYTES = 1024


def write_graphs(
    model: EchoVLM, plan: QuantizationPlan, context: int, writer: BundleWriter
) -> tuple[tuple[Graph, ...], dict[str, StageCost]]:
    """Export, quantize and write every graph; gives what the manifest lists, and the bytes of weights a stage reads."""
    with track("export graphs", 3) as advance:
        vision = export_vision(model)
        lower(vision, plan)
        ir.save(vision, writer.add(VISION))
        advance(1)
        decoder = export_decoder(model, Attention.IN_PLACE, context)
        lower(decoder, plan)
        path = writer.add(DECODER_ORT)
        ir.save(decoder, path, external_data=WEIGHTS, size_threshold_bytes=EXTERNAL_BYTES)
        advance(1)
        portable = export_decoder(model, Attention.STANDARD, context)
        lower(portable, plan)
        _share_weights(portable, path)
        ir.save(portable, writer.add(DECODER_QDQ))
        advance(1)
    # The vision graph uses standard operators only, so one file serves both formulations.
    graphs = (
        Graph("vision", "ort", VISION),
        Graph("vision", "qdq", VISION),
        Graph("decoder", "ort", DECODER_ORT),
        Graph("decoder", "qdq", DECODER_QDQ),
    )
    return graphs, {"vision": StageCost(bytes=weight_bytes(vision)), "decoder": StageCost(bytes=weight_bytes(decoder))}


def _share_weights(model: ir.Model, other: Path) -> None:
    """Point the large weights of `model` at those that the graph `other` stored outside itself under the same names."""
    stored = ir.load(other).graph.initializers
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < EXTERNAL_BYTES or name not in stored:
            continue
        external = stored[name].const_value
        # Constants that the exporter folds have names of its own, which another graph may give to other contents.
        if not isinstance(external, ir.ExternalTensor) or external.tobytes() != tensor.tobytes():
            continue
        value.const_value = ir.ExternalTensor(
            external.location,
            external.offset,
            external.length,
            external.dtype,
            shape=external.shape,
            name=name,
            base_dir=other.parent,
        )


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all weights of a graph."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
