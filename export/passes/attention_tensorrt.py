"""Pass: attention for TensorRT, over a 16-bit KV cache that is written in place."""

from __future__ import annotations

import onnx_ir as ir

from sonoedge.export.passes.base import Pass, PassError, marks, name_of, none_left
from sonoedge.export.passes.emitter import Emitter, replace

CACHE = ir.DataType.FLOAT16  # TensorRT's cache update takes float types only, so an int8 cache stays on ONNX Runtime
WRITE_AT = "write_at"
REPLACED = ("last_token", "total_tokens")  # inputs of ONNX Runtime's operator


class AttendInBuffer(Pass):
    """Requires: `sonoedge::Attention` marks. Ensures: each is a cache update and one `Attention`, both in float16.

    A cache [1, kv_heads, context, head_dim] goes in and comes out as the same buffer, new keys and values written from
    the input `write_at` on (TensorScatter, which TensorRT runs as its KVCacheUpdate layer). Attention reads the first T
    tokens of it, T being the width of `attention_bias` [1, 1, S, T].
    """

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim

    def requires(self, model: ir.Model) -> None:
        for node in marks(model, "Attention"):
            if len(node.inputs) != 8:
                raise PassError(f"{name_of(node)} has {len(node.inputs)} inputs, not 8")

    def apply(self, model: ir.Model) -> None:
        graph = model.graph
        found = marks(model, "Attention")
        if not found:  # the vision tower has no cache
            return
        write_at = ir.Value(name=WRITE_AT, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        for node in found:
            self._lower(graph, node, write_at)
        for value in list(graph.inputs):
            if value.name in REPLACED:
                graph.inputs.remove(value)
        graph.inputs.append(write_at)

    def _lower(self, graph: ir.Graph, node: ir.Node, write_at: ir.Value) -> None:
        heads, kv_heads = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
        q, k, v, past_key, past_value, _, _, bias = node.inputs
        assert bias is not None  # checked in `requires`
        emit = Emitter(name_of(node))
        start, axis = emit.constant([0]), emit.constant([2])
        seen = emit("Shape", bias, start=3, end=4)
        present: list[ir.Value] = []
        for past, new in ((past_key, k), (past_value, v)):
            grown = emit("TensorScatter", past, self._heads(emit, new, kv_heads), write_at, axis=2)
            present.append(grown)
        bias.type = ir.TensorType(CACHE)
        key, value = (emit("Slice", cache, start, seen, axis) for cache in present)  # [1, kv_heads, T, D]
        mixed = emit("Attention", self._heads(emit, q, heads), key, value, bias)  # [1, heads, S, D]
        ordered = emit("Transpose", emit("Cast", mixed, to=int(ir.DataType.FLOAT)), perm=[0, 2, 1, 3])
        result = emit("Reshape", ordered, emit.constant([1, -1, heads * self._head_dim]))
        replace(graph, node, emit.nodes, [result, *present])
        for cache in (past_key, past_value, *present):
            assert cache is not None  # checked in `requires`
            cache.type = ir.TensorType(CACHE)

    def _heads(self, emit: Emitter, x: ir.Value | None, heads: int) -> ir.Value:
        """x [1, S, heads · D] as [1, heads, S, D] in the cache's type."""
        split = emit("Reshape", x, emit.constant([1, -1, heads, self._head_dim]))
        return emit("Cast", emit("Transpose", split, perm=[0, 2, 1, 3]), to=int(CACHE))

    def ensures(self, model: ir.Model) -> None:
        none_left(model, "Attention")
        inputs = [value.name for value in model.graph.inputs]
        if any(name in inputs for name in REPLACED):
            raise PassError(f"the inputs are {inputs}")
