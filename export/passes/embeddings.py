"""Pass: token embeddings become a Gather of float rows, or of int8 rows with their scales."""

from __future__ import annotations

import onnx_ir as ir

from sonoedge.export.layout import int8_name, scale_name
from sonoedge.export.passes.base import Pass, marks, name_of, none_left
from sonoedge.export.passes.emitter import Emitter, initializer, replace
from sonoedge.export.scheme import QuantizationPlan, Scheme


class LowerEmbeddings(Pass):
    """Requires: `sonoedge::Embedding` marks of ids and weight. Ensures: none is left, standard operators only."""

    def __init__(self, plan: QuantizationPlan) -> None:
        self._plan = plan

    def apply(self, model: ir.Model) -> None:
        for node in marks(model, "Embedding"):
            ids, weight = node.inputs
            assert weight is not None  # a mark has its inputs
            emit = Emitter(name_of(node))
            scheme = self._plan.schemes.get(name_of(node), Scheme.FLOAT)
            if scheme is Scheme.FLOAT:
                embedded = emit("Gather", weight, ids)
            else:
                key, shape = str(weight.name), list(weight.shape.numpy()) if weight.shape is not None else []
                rows = initializer(model.graph, int8_name(key, scheme), ir.DataType.INT8, shape)
                scales = initializer(model.graph, scale_name(key, scheme), ir.DataType.FLOAT, shape[:1])
                picked = emit("Cast", emit("Gather", rows, ids), to=int(ir.DataType.FLOAT))
                scale = emit("Unsqueeze", emit("Gather", scales, ids), emit.constant([-1]))
                embedded = emit("Mul", picked, scale)
            replace(model.graph, node, emit.nodes, [embedded])

    def ensures(self, model: ir.Model) -> None:
        none_left(model, "Embedding")
