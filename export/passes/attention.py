"""Passes: attention over the KV cache, in place for ONNX Runtime or with standard operators that return it grown."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sonoedge.export.passes.base import Pass, PassError, marks, name_of, none_left
from sonoedge.export.passes.emitter import CONTRIB, Attribute, Emitter, replace
from sonoedge.export.scheme import CacheScheme, QuantizationPlan

INT8_CACHE: dict[str, Attribute] = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}


class AttendInPlace(Pass):
    """Requires: `sonoedge::Attention` marks, caches of the context's size. Ensures: each is one GroupQueryAttention.

    The operator writes new keys and values behind the old ones when past and present are one buffer; positions are
    rotated before, so it is given no rotary tables.
    """

    def __init__(self, plan: QuantizationPlan) -> None:
        self._plan = plan

    def apply(self, model: ir.Model) -> None:
        for node in marks(model, "Attention"):
            name = name_of(node)
            q, k, v, past_key, past_value, last_token, total_tokens, bias = node.inputs
            emit = Emitter(name)
            scales: list[ir.Value | None] = []
            attributes: dict[str, Attribute] = {
                key: node.attributes[key].as_int() for key in ("num_heads", "kv_num_heads")
            }
            if self._plan.cache is CacheScheme.INT8:
                steps = [self._plan.cache_scale(f"{name}.{part}") for part in ("key", "value")]
                scales = [None, *(emit.constant(np.array([step], np.float32)) for step in steps)]  # no attention sink
                attributes |= INT8_CACHE
            unused = (None, None, None)  # rotary tables and position ids
            inputs = [q, k, v, past_key, past_value, last_token, total_tokens, *unused, bias, *scales]
            results = emit.emit("GroupQueryAttention", inputs, attributes | {"do_rotary": 0}, 3, CONTRIB)
            replace(model.graph, node, emit.nodes, results)

    def ensures(self, model: ir.Model) -> None:
        none_left(model, "Attention")


class AttendStandard(Pass):
    """Requires: `sonoedge::Attention` marks. Ensures: standard operators; caches go in and come out grown."""

    def __init__(self, plan: QuantizationPlan, head_dim: int) -> None:
        self._plan, self._head_dim = plan, head_dim

    def requires(self, model: ir.Model) -> None:
        for node in marks(model, "Attention"):
            if len(node.inputs) != 8:
                raise PassError(f"{name_of(node)} has {len(node.inputs)} inputs, not 8")

    def apply(self, model: ir.Model) -> None:
        for node in marks(model, "Attention"):
            self._lower(model.graph, node)
        # The cache's own operator needs them; here they are inputs that nothing reads.
        for value in list(model.graph.inputs):
            if value.name in ("last_token", "total_tokens"):
                model.graph.inputs.remove(value)

    def _lower(self, graph: ir.Graph, node: ir.Node) -> None:
        name, width = name_of(node), self._head_dim
        heads, kv_heads = node.attributes["num_heads"].as_int(), node.attributes["kv_num_heads"].as_int()
        q, k, v, past_key, past_value, _, _, bias = node.inputs
        emit = Emitter(name)
        present_key = self._grown(emit, f"{name}.key", past_key, k, kv_heads)
        present_value = self._grown(emit, f"{name}.value", past_value, v, kv_heads)
        axis = emit.constant([2])
        # Read as float only at the products: a backend may move the change of type past nothing then.
        turned = emit("Unsqueeze", emit("Transpose", present_key, perm=[0, 1, 3, 2]), axis)
        key = self._read(emit, f"{name}.key", turned)  # [1, kv_heads, 1, D, T]
        value = self._read(emit, f"{name}.value", emit("Unsqueeze", present_value, axis))  # [1, kv_heads, 1, T, D]
        split = emit("Reshape", q, emit.constant([1, -1, kv_heads, heads // kv_heads, width]))
        rows = emit("Transpose", split, perm=[0, 2, 3, 1, 4])  # [1, kv_heads, group, S, D]
        scaled = emit("Mul", rows, emit.constant(np.array(width**-0.5, np.float32)))
        scores = emit("MatMul", scaled, key)  # [1, kv_heads, group, S, T]
        weights = emit("Softmax", emit("Add", scores, emit("Unsqueeze", bias, axis)), axis=-1)
        mixed = emit("MatMul", weights, value)  # [1, kv_heads, group, S, D]
        ordered = emit("Transpose", mixed, perm=[0, 3, 1, 2, 4])
        result = emit("Reshape", ordered, emit.constant([1, -1, heads * width]))
        replace(graph, node, emit.nodes, [result, present_key, present_value])
        for cached, size in (
            (past_key, "past"),
            (past_value, "past"),
            (present_key, "total"),
            (present_value, "total"),
        ):
            assert cached is not None  # checked in `requires`
            cached.shape = ir.Shape([1, kv_heads, size, width])

    def _grown(self, emit: Emitter, name: str, past: ir.Value | None, new: ir.Value | None, kv_heads: int) -> ir.Value:
        """Keys or values [1, kv_heads, T, D] as the cache stores them, the new ones behind the old."""
        split = emit("Reshape", new, emit.constant([1, -1, kv_heads, self._head_dim]))
        added = emit("Transpose", split, perm=[0, 2, 1, 3])  # [1, kv_heads, S, D]
        if self._plan.cache is CacheScheme.INT8:
            added = emit("QuantizeLinear", added, *self._scale(emit, name))
        return emit("Concat", past, added, axis=2)

    def _read(self, emit: Emitter, name: str, stored: ir.Value) -> ir.Value:
        """What the cache stores as float."""
        if self._plan.cache is CacheScheme.FLOAT:
            return stored
        return emit("DequantizeLinear", stored, *self._scale(emit, name))

    def _scale(self, emit: Emitter, name: str) -> tuple[ir.Value, ir.Value]:
        scale = emit.constant(np.array(self._plan.cache_scale(name), np.float32))
        return scale, emit.constant(np.array(0, np.int8))

    def ensures(self, model: ir.Model) -> None:
        none_left(model, "Attention")
        if any(node.domain == CONTRIB for node in model.graph):
            raise PassError("an operator of ONNX Runtime's own is in the portable graph")
