"""The routed experts of a layer: an ONNX function that says what they compute, or QMoE for one token at a time."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from sonoedge.export.markers import DOMAIN
from sonoedge.export.passes.emitter import CONTRIB, Attribute, Emitter
from sonoedge.export.passes.products import OFFSET, Inputs, Purpose, Weights, needs_zero, opset, product
from sonoedge.export.scheme import BLOCK, Scheme

# One graph may hold experts of several schemes, and a function is known by its name alone.
FUNCTION_NAMES = {
    Scheme.W8A8: "Experts",
    Scheme.W8A8_DYNAMIC: "DynamicExperts",
    Scheme.W8A16: "WeightOnlyExperts",
    Scheme.W8A16_BLOCK: "BlockExperts",
    Scheme.FLOAT: "FloatExperts",
}
SMALLEST_BLOCK = 16  # of QMoE


class Shape:
    """Sizes of a mixture: `experts` of width `inner`, of which a token takes `chosen`, between vectors of `hidden`."""

    def __init__(self, experts: int, chosen: int, hidden: int, inner: int) -> None:
        self.experts, self.chosen, self.hidden, self.inner = experts, chosen, hidden, inner

    def block(self, scheme: Scheme) -> int | None:
        """The block of inputs a scale that QMoE can take, None where it can take none."""
        divisor = math.gcd(BLOCK, self.hidden, self.inner)
        least = BLOCK if scheme is Scheme.W8A16_BLOCK else SMALLEST_BLOCK
        return divisor if divisor >= least else None


def experts_function(shape: Shape, scheme: Scheme, purpose: Purpose, layer: str) -> ir.Function:
    """What a layer's node of experts means, for x [tokens, hidden] and weights [tokens, experts], zero if not chosen.

    Further inputs: the scale of x where the scheme has a fixed one; then for each expert gate and up joined
    [2 · inner, hidden] and down [hidden, inner], each with scales and zero points where they are int8, and before down
    the scale of the expert's hidden activation where the scheme has a fixed one. Output [tokens, hidden]: the sum over
    experts of weights[e] · down(silu(gate(x)) · up(x)). Every expert runs, those not chosen weigh nothing, so the
    result is exact.
    """
    # Every layer has a function of its own: TensorRT writes a body out at each call and refuses a layer's name twice.
    name = f"{FUNCTION_NAMES[scheme]}{layer}"
    emit, inputs = Emitter(name), Inputs()
    arguments: list[ir.Value] = []

    def argument(name: str) -> ir.Value:
        arguments.append(ir.Value(name=name))
        return arguments[-1]

    def stored(label: str, rows: int, columns: int) -> Weights:
        values = argument(f"{label}_values")
        scale = None if scheme is Scheme.FLOAT else argument(f"{label}_scale")
        zero = argument(f"{label}_zero") if needs_zero(scheme, purpose) else None
        return Weights(rows, columns, values, scale, zero)

    fixed = scheme is Scheme.W8A8
    x, weights = argument("x"), argument("weights")
    input_scale = argument("input_scale") if fixed else None
    total: ir.Value | None = None
    for expert, share in enumerate(emit.split(weights, shape.experts)):  # [tokens, 1] each
        joined = stored(f"gate_up_{expert}", 2 * shape.inner, shape.hidden)
        gate, up = emit.split(product(emit, inputs, x, joined, scheme, purpose, input_scale), 2)  # [tokens, inner] each
        hidden = emit("Mul", emit("Mul", gate, emit("Sigmoid", gate)), up)
        hidden_scale = argument(f"hidden_scale_{expert}") if fixed else None
        down = stored(f"down_{expert}", shape.hidden, shape.inner)
        part = emit("Mul", product(emit, inputs, hidden, down, scheme, purpose, hidden_scale), share)
        total = part if total is None else emit("Add", total, part)
    assert total is not None  # a mixture has at least one expert
    opsets = {"": opset(purpose), CONTRIB: 1}
    body = ir.Graph(arguments, [total], nodes=emit.nodes, opset_imports=opsets, name=name)
    return ir.Function(DOMAIN, name, graph=body, attributes=[])


def qmoe(
    emit: Emitter, x: ir.Value, weights: ir.Value, shape: Shape, scheme: Scheme, stored: dict[str, ir.Value]
) -> ir.Value:
    """ONNX Runtime's operator, which reads the chosen experts only; `stored` has bytes seen as uint8 and their scales.

    It selects by the weights themselves (those not chosen are zero) and takes them as they are: its own routing would
    renormalise them.
    """
    block = shape.block(scheme)
    assert block is not None  # asked before
    sizes = {"gate_up": (2 * shape.inner, shape.hidden), "down": (shape.hidden, shape.inner)}
    ready: list[ir.Value] = []
    for part, (rows, columns) in sizes.items():
        values = emit("BitwiseXor", stored[f"{part}_values"], emit.constant(np.array(OFFSET, np.uint8)))
        scale = stored[f"{part}_scale"]  # [experts, rows] or [experts, rows, blocks]
        if scheme is not Scheme.W8A16_BLOCK:
            wide = emit.constant([shape.experts, rows, columns // block])
            scale = emit("Expand", emit("Unsqueeze", scale, emit.constant([2])), wide)
        if part == "gate_up":
            values = _interleaved(emit, values, shape, columns)
            scale = _interleaved(emit, scale, shape, columns // block)
        ready += [values, scale]
    unused = [None] * 7  # biases, a third product, zero points
    inputs = [x, weights, ready[0], ready[1], None, ready[2], ready[3], *unused, weights]
    attributes: dict[str, Attribute] = {
        "k": shape.chosen,
        "expert_weight_bits": 8,
        "block_size": block,
        "activation_type": "swiglu",
        "swiglu_fusion": 1,  # gate and up rows take turns
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "normalize_routing_weights": 0,
    }
    return emit.emit("QMoE", inputs, attributes, 1, CONTRIB)[0]


def _interleaved(emit: Emitter, joined: ir.Value, shape: Shape, columns: int) -> ir.Value:
    """[experts, gate rows then up rows, columns] with gate and up rows taking turns."""
    split = emit("Reshape", joined, emit.constant([shape.experts, 2, shape.inner, columns]))
    turned = emit("Transpose", split, perm=[0, 2, 1, 3])
    return emit("Reshape", turned, emit.constant([shape.experts, 2 * shape.inner, columns]))
