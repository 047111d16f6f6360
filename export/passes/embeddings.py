"""Pass: token embeddings become a Gather of float rows, or of int8 rows with their scales."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sonoedge.export.layout import int8_name, scale_name
from sonoedge.export.passes.base import Pass, marks, name_of, none_left
from sonoedge.export.passes.emitter import Emitter, initializer, replace
from sonoedge.export.passes.products import Purpose, for_tensorrt
from sonoedge.export.passes.views import WORD_BYTES, WORDS
from sonoedge.export.scheme import QuantizationPlan, Scheme

LOWEST = -(2**31)


class LowerEmbeddings(Pass):
    """Requires: `sonoedge::Embedding` marks of ids and weight. Ensures: none is left, standard operators only."""

    def __init__(self, plan: QuantizationPlan, purpose: Purpose) -> None:
        self._plan, self._purpose = plan, purpose

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
                name = int8_name(key, scheme)
                scales = initializer(model.graph, scale_name(key, scheme), ir.DataType.FLOAT, shape[:1])
                if for_tensorrt(self._purpose):
                    words = [shape[0], shape[1] // WORD_BYTES]
                    rows = initializer(model.graph, name + WORDS, ir.DataType.INT32, words)
                    picked = _bytes_of(emit, emit("Gather", rows, ids), shape[1])
                else:
                    rows = initializer(model.graph, name, ir.DataType.INT8, shape)
                    picked = emit("Cast", emit("Gather", rows, ids), to=int(ir.DataType.FLOAT))
                scale = emit("Unsqueeze", emit("Gather", scales, ids), emit.constant([-1]))
                embedded = emit("Mul", picked, scale)
            replace(model.graph, node, emit.nodes, [embedded])

    def ensures(self, model: ir.Model) -> None:
        none_left(model, "Embedding")


def _bytes_of(emit: Emitter, words: ir.Value, width: int) -> ir.Value:
    """The int8 values in int32 words [1, tokens, width / 4], the lowest byte first, as float32 [1, tokens, width].

    TensorRT lets an int8 constant be read by DequantizeLinear only, which would turn the whole table into floats.
    """

    def number(value: int) -> ir.Value:
        return emit.constant(np.array(value, np.int32))

    negative = emit("Less", words, number(0))
    # Without its sign bit a word is positive, so that integer division is a shift; the bit goes back to the last byte.
    rest = emit("Where", negative, emit("Sub", words, number(LOWEST)), words)
    parts: list[ir.Value] = []
    for position in range(WORD_BYTES):
        higher = emit("Div", rest, number(256))
        byte = emit("Sub", rest, emit("Mul", higher, number(256)))  # 0 to 255
        if position == WORD_BYTES - 1:
            byte = emit("Where", negative, emit("Sub", byte, number(128)), byte)
        else:
            byte = emit("Where", emit("Less", byte, number(128)), byte, emit("Sub", byte, number(256)))
        parts.append(emit("Unsqueeze", byte, emit.constant([-1])))
        rest = higher
    values = emit("Reshape", emit("Concat", *parts, axis=-1), emit.constant([1, -1, width]))
    return emit("Cast", values, to=int(ir.DataType.FLOAT))
