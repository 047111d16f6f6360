"""Writing nodes: a collector that names nodes after what they compute, for graphs and for bodies of functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

CONTRIB = "com.microsoft"
Attribute = int | float | str | Sequence[int]


class Emitter:
    """Collects nodes named after `prefix`."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.nodes = prefix, list[ir.Node]()

    def __call__(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Attribute) -> ir.Value:
        """One node with one output."""
        return self.emit(op_type, inputs, attributes, 1, domain)[0]

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Attribute],
        outputs: int,
        domain: str = "",
    ) -> Sequence[ir.Value]:
        """One node."""
        name = f"{self.prefix}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, attributes=attributes or None, num_outputs=outputs, name=name, domain=domain)
        for index, output in enumerate(node.outputs):
            output.name = f"{name}.{index}"
        self.nodes.append(node)
        return node.outputs

    def constant(self, array: npt.NDArray[np.generic] | Sequence[int]) -> ir.Value:
        """A small constant; sequences of integers become int64."""
        value = np.asarray(array, np.int64) if not isinstance(array, np.ndarray) else array
        name = f"{self.prefix}/Constant_{len(self.nodes)}"
        node = ir.node("Constant", [], attributes={"value": ir.tensor(value, name=name)}, name=name)
        node.outputs[0].name = f"{name}.0"
        self.nodes.append(node)
        return node.outputs[0]

    def split(self, x: ir.Value, parts: int) -> Sequence[ir.Value]:
        """x in equal parts along its last axis."""
        return self.emit("Split", (x,), {"axis": -1, "num_outputs": parts}, parts)


def initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """The initializer `name`, made without a value when it is not there yet."""
    if name not in graph.initializers:
        graph.initializers[name] = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    return graph.initializers[name]


def filled(graph: ir.Graph, name: str, array: npt.NDArray[np.generic]) -> ir.Value:
    """The initializer `name` holding `array`, made when it is not there yet."""
    value = initializer(graph, name, ir.DataType.from_numpy(array.dtype), array.shape)
    if value.const_value is None:
        value.const_value = ir.tensor(array, name=name)
    return value


def replace(graph: ir.Graph, node: ir.Node, nodes: Sequence[ir.Node], results: Sequence[ir.Value]) -> None:
    """Put `nodes` in place of `node`, whose outputs become `results`."""
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, list(node.outputs), results)
