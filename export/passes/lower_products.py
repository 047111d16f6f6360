"""Pass: every `sonoedge::Linear` and `sonoedge::Experts` mark becomes operators in the plan's scheme."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sonoedge.export.layout import Layout, expert_name, int8_name, product_key, scale_name
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.passes.base import Pass, PassError, marks, name_of
from sonoedge.export.passes.emitter import Attribute, Emitter, filled, initializer, replace
from sonoedge.export.passes.expert_plugins import Dispatch, ExpertWeights, chosen, grouped
from sonoedge.export.passes.experts import Shape, experts_function, qmoe
from sonoedge.export.passes.products import Inputs, Purpose, Weights, for_tensorrt, needs_bits, needs_zero, product
from sonoedge.export.passes.views import BITS, part_name, stored_name, view
from sonoedge.export.plugins.dispatch import BLOCK_ROWS, WIDTH_MULTIPLE
from sonoedge.export.plugins.registration import NODE_ATTRIBUTES
from sonoedge.export.scheme import QuantizationPlan, Scheme

# TensorRT moves the split into queries, keys and values through one product of all three, which then runs in float.
JOINED = {"attn.qkv": 3}  # products whose rows are several products', by the end of the name
TYPES = {"int8": ir.DataType.INT8, "float32": ir.DataType.FLOAT}


class LowerProducts(Pass):
    """Requires: marks whose names the plan knows, weights in the layout.

    Ensures: no `sonoedge::Linear` is left; a node of experts is left only with the function that says what it computes;
    int8 weights have zero point 0 and a scale an output channel or a block.

    dispatch: experts become plugins where their scheme has kernels, the function elsewhere; TENSORRT only. block_rows:
    tokens of one expert that a plugin multiplies together.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: QuantizationPlan,
        layout: Layout,
        purpose: Purpose,
        dispatch: Dispatch = Dispatch.FUNCTION,
        block_rows: int = BLOCK_ROWS[0],
    ) -> None:
        self._config, self._plan, self._layout, self._purpose = config, plan, layout, purpose
        self._dispatch, self._block_rows = dispatch, block_rows
        self._inputs = Inputs()

    def requires(self, model: ir.Model) -> None:
        for node in marks(model, "Linear", "Experts"):
            if name_of(node) not in self._plan.schemes:
                raise PassError(f"the plan has no scheme for {name_of(node)}")

    def apply(self, model: ir.Model) -> None:
        for node in marks(model, "Linear", "Experts"):
            if node.op_type == "Linear":
                self._linear(model.graph, node)
            else:
                self._experts(model, node)

    def _linear(self, graph: ir.Graph, node: ir.Node) -> None:
        name, scheme = name_of(node), self._plan.schemes[name_of(node)]
        x, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        assert x is not None  # a mark has its input
        assert x.shape is not None  # the exporter infers it
        emit = Emitter(name)
        key = product_key(name, self._config)
        values = key if scheme is Scheme.FLOAT else int8_name(key, scheme)
        parts = self._weights(graph, scheme, values, scale_name(key, scheme), self._parts(name, scheme))
        rows, columns = sum(part.rows for part in parts), parts[0].columns
        # MatMulNBits takes any rank; the others want matrices.
        ranked = len(x.shape) > 2 and not needs_bits(scheme, self._purpose)
        matrix = self._inputs.flat(emit, x, columns) if ranked else x
        scale = None
        if scheme is Scheme.W8A8:
            scale = self._inputs.scale(emit, x, self._plan.activation_scale(name))
        results = [product(emit, self._inputs, matrix, part, scheme, self._purpose, scale) for part in parts]
        result = results[0] if len(results) == 1 else emit("Concat", *results, axis=-1)
        if bias is not None:
            result = emit("Add", result, bias)
        if ranked:  # [1, tokens, out]
            result = emit("Reshape", result, emit.constant([1, -1, rows]))
        replace(graph, node, emit.nodes, [result])

    def _experts(self, model: ir.Model, node: ir.Node) -> None:
        name, graph = name_of(node), model.graph
        scheme, moe = self._plan.schemes[name], self._config.moe
        assert moe is not None  # the mark comes from a mixture
        hidden = self._config.hidden_size
        shape = Shape(moe.num_experts, moe.num_experts_per_tok, hidden, moe.moe_intermediate_size)
        emit = Emitter(name)
        x, weights = node.inputs[:2]
        assert x is not None  # a mark has its inputs
        assert weights is not None
        matrix = self._inputs.flat(emit, x, hidden)
        shares = emit("Reshape", weights, emit.constant([-1, shape.experts]))
        if self._purpose is Purpose.TOKEN and scheme is not Scheme.FLOAT and shape.block(scheme) is not None:
            stored = {
                f"{part}_{what}": self._stored(graph, f"{name}.{part}_{what}", bits=what == "values")
                for part in ("gate_up", "down")
                for what in ("values", "scale")
            }
            mixed = qmoe(emit, matrix, shares, shape, scheme, stored)
        elif has_kernels(self._dispatch, scheme, self._config):
            mixed = self._plugins(graph, emit, matrix, name)
        else:
            function = experts_function(shape, scheme, self._purpose, name.split(".")[2])
            model.functions[function.identifier()] = function
            arguments = [matrix, shares, *self._arguments(graph, emit, name, scheme, shape.experts)]
            call = ir.Node(function.domain, function.name, arguments, num_outputs=1, name=name)
            emit.nodes.append(call)
            mixed = call.outputs[0]
        replace(graph, node, emit.nodes, [emit("Reshape", mixed, emit.constant([1, -1, hidden]))])

    def _plugins(self, graph: ir.Graph, emit: Emitter, x: ir.Value, name: str) -> ir.Value:
        """The experts' mix [tokens, hidden] of x, by the kernels that the dispatch asks for."""
        moe = self._config.moe
        assert moe is not None  # the mark comes from a mixture
        layer = name.split(".")[2]
        named = {value.name: value for node in graph for value in node.outputs}
        logits = emit("Reshape", named[f"probe.router.{layer}"], emit.constant([-1, moe.num_experts]))
        parts = ("gate_up_values", "gate_up_scale", "down_values", "down_scale")
        weights = ExpertWeights(*(self._stored(graph, f"{name}.{part}") for part in parts))
        sizes: dict[str, Attribute] = {
            **NODE_ATTRIBUTES,
            "experts": moe.num_experts,
            "chosen": moe.num_experts_per_tok,
            "hidden": self._config.hidden_size,
            "inner": moe.moe_intermediate_size,
            "norm_topk_prob": int(moe.norm_topk_prob),
            "block_rows": self._block_rows,
        }
        if self._dispatch is Dispatch.CHOSEN:
            return chosen(emit, x, logits, weights, sizes)
        input_scale = emit.constant(np.array([self._plan.activation_scale(name)], np.float32))
        scales = [self._plan.activation_scale(f"{name}.{e}.down_proj") for e in range(moe.num_experts)]
        hidden_scale = emit.constant(np.array(scales, np.float32))
        return grouped(emit, x, logits, weights, input_scale, hidden_scale, sizes)

    def _arguments(
        self, graph: ir.Graph, emit: Emitter, name: str, scheme: Scheme, experts: int
    ) -> list[ir.Value | None]:
        """What `experts_function` takes after the activations, in its order."""
        found: list[ir.Value | None] = []
        fixed = scheme is Scheme.W8A8
        if fixed:
            found.append(emit.constant(np.array(self._plan.activation_scale(name), np.float32)))
        for expert in range(experts):
            for part in ("gate_up", "down"):
                if fixed and part == "down":
                    scale = self._plan.activation_scale(f"{name}.{expert}.down_proj")
                    found.insert(len(found), emit.constant(np.array(scale, np.float32)))
                values, scales = (expert_name(name, expert, part, what) for what in ("values", "scale"))
                (weights,) = self._weights(graph, scheme, values, scales)
                found += [value for value in weights[2:] if value is not None]
        return found

    def _parts(self, name: str, scheme: Scheme) -> int:
        """How many products stand for the product `name`."""
        if scheme is Scheme.FLOAT or not for_tensorrt(self._purpose):
            return 1
        return next((parts for end, parts in JOINED.items() if name.endswith(end)), 1)

    def _weights(self, graph: ir.Graph, scheme: Scheme, values: str, scale: str, parts: int = 1) -> list[Weights]:
        """The weights called `values`, in equal parts of their rows, as initializers with what the scheme needs."""
        found: list[Weights] = []
        for index in range(parts):
            names = (values, scale) if parts == 1 else tuple(part_name(n, index, parts) for n in (values, scale))
            rows, columns = view(names[0], self._layout.tensors[values]).shape
            zero = None
            if needs_zero(scheme, self._purpose):
                shape = view(names[1], self._layout.tensors[scale]).shape
                zero = filled(graph, f"{names[0]}_zero", np.zeros(shape, np.int8))
            held = self._stored(graph, names[0], bits=needs_bits(scheme, self._purpose))
            found.append(
                Weights(rows, columns, held, None if scheme is Scheme.FLOAT else self._stored(graph, names[1]), zero)
            )
        return found

    def _stored(self, graph: ir.Graph, name: str, *, bits: bool = False) -> ir.Value:
        stored = self._layout.tensors[stored_name(name)]
        shape = view(name, stored).shape
        if bits:
            return initializer(graph, name + BITS, ir.DataType.UINT8, shape)
        return initializer(graph, name, TYPES[stored.dtype], shape)

    def ensures(self, model: ir.Model) -> None:
        for node in marks(model, "Linear", "Experts"):
            if node.op_type == "Linear" or node.op_identifier() not in model.functions:
                raise PassError(f"{name_of(node)} has no meaning")


def has_kernels(dispatch: Dispatch, scheme: Scheme, config: ModelConfig) -> bool:
    """Whether experts of these sizes and this scheme can run by the kernels of a dispatch."""
    moe = config.moe
    if moe is None or config.hidden_size % WIDTH_MULTIPLE or moe.moe_intermediate_size % WIDTH_MULTIPLE:
        return False
    if dispatch is Dispatch.GROUPED:
        return scheme is Scheme.W8A8
    return dispatch is Dispatch.CHOSEN and scheme.per_channel
