"""Pass: root-mean-square normalisation as one operator of ONNX Runtime, or as standard ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sonoedge.export.passes.base import Pass, marks, name_of, none_left
from sonoedge.export.passes.emitter import Emitter, replace
from sonoedge.export.passes.products import Purpose


class LowerNorms(Pass):
    """Requires: `sonoedge::RMSNorm` marks of x and weight. Ensures: none is left; portable graphs stay standard."""

    def __init__(self, purpose: Purpose) -> None:
        self._purpose = purpose

    def apply(self, model: ir.Model) -> None:
        for node in marks(model, "RMSNorm"):
            x, weight = node.inputs
            emit = Emitter(name_of(node))
            epsilon = node.attributes["epsilon"].as_float()
            if self._purpose is Purpose.PORTABLE:
                mean = emit("ReduceMean", emit("Mul", x, x), emit.constant([-1]))
                root = emit("Sqrt", emit("Add", mean, emit.constant(np.array(epsilon, np.float32))))
                normed = emit("Mul", emit("Div", x, root), weight)
            elif self._purpose is Purpose.TENSORRT:
                normed = emit("RMSNormalization", x, weight, axis=-1, epsilon=epsilon)
            else:
                normed = emit("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)
            replace(model.graph, node, emit.nodes, [normed])

    def ensures(self, model: ir.Model) -> None:
        none_left(model, "RMSNorm")
