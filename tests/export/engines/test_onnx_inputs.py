"""Inputs of an ONNX file get fixed shapes, and nothing else of it changes."""

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from sonoedge.errors import SonoEdgeError
from sonoedge.export.engines.onnx_inputs import fix_inputs


def model(shapes: dict[str, list[int | str]]) -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"], name) for name in shapes]
    outputs = [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None) for name in shapes]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, [])
    return helper.make_model(graph, doc_string="ä" * 200, opset_imports=[helper.make_opsetid("", 24)])


names = st.text("abc_xyz", min_size=1, max_size=12)
dims = st.one_of(st.integers(1, 2**40), names)


@given(st.dictionaries(names, st.lists(dims, min_size=1, max_size=5), min_size=1, max_size=4), st.data())
def test_the_named_inputs_change_and_nothing_else(shapes: dict[str, list[int | str]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(sorted(shapes)), unique=True))
    fixed = {name: tuple(data.draw(st.integers(1, 2**40)) for _ in shapes[name]) for name in chosen}
    found = onnx.load_from_string(fix_inputs(model(shapes).SerializeToString(), fixed, "a.onnx"))
    assert found == model({name: list(fixed.get(name, shape)) for name, shape in shapes.items()})


@pytest.mark.parametrize("content", [b"vision", b"\xff" * 20, b"\x3a\x05ab", b"\x3a"])
def test_a_damaged_file_is_refused(content: bytes) -> None:
    with pytest.raises(SonoEdgeError, match=r"a.onnx is no ONNX file \(.*\): build the bundle again"):
        fix_inputs(content, {}, "a.onnx")
