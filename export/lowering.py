"""Graph pass: every `sonoedge::Linear` and `sonoedge::Experts` mark becomes standard operators, in the plan's scheme.

Requires: a graph from `export.graphs`, weights of marks as float32 initializers. Ensures: no `sonoedge::Linear` is
left; each node of experts has an ONNX function of standard operators that says what it computes; quantized weights are
int8 with zero point 0, per output channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sonoedge.errors import SonoEdgeError
from sonoedge.export.graphs import OPSET
from sonoedge.export.markers import DOMAIN

INT8_MAX = 127
SMALLEST = np.finfo(np.float32).tiny


class Scheme(Enum):
    """How one product is computed."""

    FLOAT = "float"
    W8A8 = "w8a8"  # int8 weights per output channel, int8 activations per tensor


class QuantizationPlan(msgspec.Struct, frozen=True):
    """The scheme of every named product, and the largest input that calibration saw there."""

    schemes: Mapping[str, Scheme]
    input_maximum: Mapping[str, float]

    def activation_scale(self, name: str) -> float:
        """Scale of the int8 input of product `name`; raises SonoEdgeError when calibration never saw it."""
        maximum = self.input_maximum.get(name)
        if maximum is None or not maximum > 0:
            raise SonoEdgeError(
                f"calibration has no range for {name!r}: calibrate on more frames, or keep it float in the recipe"
            )
        return maximum / INT8_MAX


def quantize_weight(weight: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Symmetric int8 per row: weight [out, in] to int8 [out, in] and scales float32 [out].

    Raises SonoEdgeError when a weight is not finite.
    """
    largest = np.abs(weight).max(axis=1)  # [out]
    if not np.isfinite(largest).all():
        raise SonoEdgeError("a weight is not finite: check the checkpoint, it cannot be quantized")
    # Rows of zeros take any scale; the smallest normal number keeps the scale of tiny rows from vanishing.
    scale = np.where(largest > 0, np.maximum(largest / INT8_MAX, SMALLEST), 1.0).astype(np.float32)  # [out]
    return np.clip(np.rint(weight / scale[:, None]), -INT8_MAX, INT8_MAX).astype(np.int8), scale


def lower(model: ir.Model, plan: QuantizationPlan) -> None:
    """Rewrite all marks of `model` in place."""
    graph = model.graph
    lowering = _Lowering(graph, plan)
    for node in list(graph):
        if node.domain != DOMAIN:
            continue
        if node.op_type == "Linear":
            lowering.linear(node)
        elif node.op_type == "Experts":
            function = lowering.experts(node)
            model.functions[function.identifier()] = function
    left = [node.op_type for node in graph if node.domain == DOMAIN and node.op_type == "Linear"]
    assert not left, f"marks left after lowering: {left}"
    model.opset_imports[DOMAIN] = 1
    unused = [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_output()]
    for name in unused:
        del graph.initializers[name]


class _Lowering:
    """Emits standard operators in place of marks, one graph at a time."""

    def __init__(self, graph: ir.Graph, plan: QuantizationPlan) -> None:
        self.graph, self.plan = graph, plan

    def constant(self, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
        """An initializer called `name`, shared when it is there already."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
        value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.graph.register_initializer(value)
        return value

    def zeros(self, label: str, channels: int) -> ir.Value:
        """The zero points of one weight: ONNX Runtime's precise mode fails when they are left out or shared."""
        return self.constant(f"{label}.weight_zero", np.zeros(channels, np.int8))

    def linear(self, node: ir.Node) -> None:
        name = node.attributes["name"].as_string()
        x, weight = node.inputs[0], node.inputs[1]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        emit = _Emitter(name)
        if self.plan.schemes[name] is Scheme.W8A8:
            scale = self.constant(f"{name}.input_scale", np.asarray(self.plan.activation_scale(name), np.float32))
            int8, scales = quantize_weight(_array(weight))
            product = emit(
                "MatMul",
                emit.fake_quantized(x, scale, self.constant("int8_zero", np.asarray(0, np.int8))),
                emit(
                    "DequantizeLinear",
                    self.constant(f"{name}.weight_int8", np.ascontiguousarray(int8.T)),
                    self.constant(f"{name}.weight_scale", scales),
                    self.zeros(name, scales.size),
                    axis=1,
                ),
            )
        else:
            transposed = np.ascontiguousarray(_array(weight).T)
            product = emit("MatMul", x, self.constant(f"{name}.weight_transposed", transposed))
        if bias is not None:
            product = emit("Add", product, bias)
        self.replace(node, emit.nodes, product)

    def experts(self, node: ir.Node) -> ir.Function:
        """Give the node its quantized weights and return the function that says what it computes."""
        name = node.attributes["name"].as_string()
        experts = (len(node.inputs) - 2) // 3
        quantized = self.plan.schemes[name] is Scheme.W8A8
        inputs = [node.inputs[0], node.inputs[1]]
        if quantized:
            inputs.append(self.constant("int8_zero", np.asarray(0, np.int8)))
            scale = self.plan.activation_scale(name)
            inputs.append(self.constant(f"{name}.input_scale", np.asarray(scale, np.float32)))
        for expert in range(experts):
            gate, up, down = (_array(value) for value in node.inputs[2 + 3 * expert : 5 + 3 * expert])
            matrices = {"gate_up": np.concatenate([gate, up]), "down": down}
            for part, matrix in matrices.items():
                label = f"{name}.{expert}.{part}"
                if quantized and part == "down":
                    scale = self.plan.activation_scale(f"{name}.{expert}.down_proj")
                    inputs.append(self.constant(f"{name}.{expert}.hidden_scale", np.asarray(scale, np.float32)))
                if quantized:
                    int8, scales = quantize_weight(matrix)
                    inputs.append(self.constant(f"{label}.weight_int8", np.ascontiguousarray(int8.T)))
                    inputs.append(self.constant(f"{label}.weight_scale", scales))
                    inputs.append(self.zeros(label, scales.size))
                else:
                    inputs.append(self.constant(f"{label}.weight_transposed", np.ascontiguousarray(matrix.T)))
        function = experts_function(experts, quantized)
        replacement = ir.Node(DOMAIN, function.name, inputs, num_outputs=1, name=name)
        self.replace(node, [replacement], replacement.outputs[0])
        return function

    def replace(self, node: ir.Node, nodes: list[ir.Node], result: ir.Value) -> None:
        old = node.outputs[0]
        result.shape, result.type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(self.graph, node, [node], nodes, [old], [result])


class _Emitter:
    """Collects nodes named after what they compute."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.nodes = prefix, list[ir.Node]()

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: int) -> ir.Value:
        return self.emit(op_type, inputs, attributes, 1)[0]

    def split(self, x: ir.Value, parts: int) -> Sequence[ir.Value]:
        """x in equal parts along its last axis."""
        return self.emit("Split", (x,), {"axis": -1, "num_outputs": parts}, parts)

    def emit(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int], outputs: int
    ) -> Sequence[ir.Value]:
        name = f"{self.prefix}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, attributes=attributes or None, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = f"{name}.{index}"
        self.nodes.append(node)
        return node.outputs

    def fake_quantized(self, x: ir.Value | None, scale: ir.Value, zero: ir.Value) -> ir.Value:
        """x through int8 and back, per tensor."""
        return self("DequantizeLinear", self("QuantizeLinear", x, scale, zero), scale, zero)


def experts_function(experts: int, quantized: bool) -> ir.Function:
    """What a node of experts means, in standard operators.

    Inputs: x [..., H], weights [..., E]; quantized: zero point and scale of x; then for each expert gate and up joined
    [H, 2·I] and down [I, H], each int8 with scales and zero points when quantized, the scale of the hidden activation
    between them. Output [..., H]: the sum over experts of weights[e] · down(silu(gate(x)) · up(x)). Every expert runs;
    those not chosen have weight 0, so the result is exact.
    """
    emit = _Emitter("experts")
    arguments: list[ir.Value] = []

    def argument(name: str) -> ir.Value:
        arguments.append(ir.Value(name=name))
        return arguments[-1]

    def product(hidden: ir.Value, label: str) -> ir.Value:
        weight = argument(f"{label}_weight")
        if quantized:
            weight = emit("DequantizeLinear", weight, argument(f"{label}_scale"), argument(f"{label}_zero"), axis=1)
        return emit("MatMul", hidden, weight)

    x, weights = argument("x"), argument("weights")
    if quantized:
        zero = argument("int8_zero")
        x = emit.fake_quantized(x, argument("input_scale"), zero)
    shares = emit.split(weights, experts)  # experts of [..., 1]
    total: ir.Value | None = None
    for expert, share in enumerate(shares):
        gate, up = emit.split(product(x, f"gate_up_{expert}"), 2)  # [..., I] each
        hidden = emit("Mul", emit("Mul", gate, emit("Sigmoid", gate)), up)
        if quantized:
            hidden = emit.fake_quantized(hidden, argument(f"hidden_scale_{expert}"), zero)
        part = emit("Mul", product(hidden, f"down_{expert}"), share)
        total = part if total is None else emit("Add", total, part)
    assert total is not None  # a mixture has at least one expert
    # Two names: one graph may hold experts of both schemes, and a function is known by its name alone.
    name = "Experts" if quantized else "FloatExperts"
    body = ir.Graph(arguments, [total], nodes=emit.nodes, opset_imports={"": OPSET}, name=name)
    return ir.Function(DOMAIN, name, graph=body, attributes=[])


def _array(value: ir.Value | None) -> npt.NDArray[np.float32]:
    assert value is not None  # marks have all their inputs
    assert value.const_value is not None  # and their weights are initializers
    return value.const_value.numpy()
