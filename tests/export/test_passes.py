"""Graph passes: each checks what it requires and ensures, a failure names the pass and those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from sonoedge.export.graphs import OPSET
from sonoedge.export.layout import Layout, plan_layout
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.passes.attach import AttachWeights
from sonoedge.export.passes.attention import AttendInPlace, AttendStandard
from sonoedge.export.passes.attention_tensorrt import AttendInBuffer
from sonoedge.export.passes.base import Pass, PassError, marks, none_left, run_passes
from sonoedge.export.passes.dead_code import RemoveUnused
from sonoedge.export.passes.embeddings import LowerEmbeddings
from sonoedge.export.passes.emitter import CONTRIB, Emitter, filled, initializer
from sonoedge.export.passes.experts import Shape, experts_function
from sonoedge.export.passes.lower_products import LowerProducts
from sonoedge.export.passes.norms import LowerNorms
from sonoedge.export.passes.probes import NameProbes
from sonoedge.export.passes.products import Purpose, for_tensorrt, opset
from sonoedge.export.quantize import product_names
from sonoedge.export.scheme import CacheScheme, QuantizationPlan, Scheme
from sonoedge.runtime.sessions.ort import load_graph

FLOAT = ir.TensorType(ir.DataType.FLOAT)
SHARED = QuantizationPlan({}, {})


def value(name: str, *shape: int | str, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def graph_of(inputs: list[ir.Value], nodes: list[ir.Node], held: list[ir.Value] | None = None) -> ir.Model:
    outputs = nodes[-1].outputs
    opsets = {"": OPSET, DOMAIN: 1}
    return ir.Model(
        ir.Graph(inputs, outputs, nodes=nodes, initializers=held or (), opset_imports=opsets, name="g"), ir_version=10
    )


def mark(op_type: str, name: str, inputs: Sequence[ir.Value | None], outputs: int = 1, **attributes: int) -> ir.Node:
    node = ir.node(op_type, inputs, attributes={"name": name, **attributes}, domain=DOMAIN, num_outputs=outputs)
    for index, output in enumerate(node.outputs):
        output.name, output.type, output.shape = f"{name}.out{index}", FLOAT, ir.Shape([1, "n", 8])
    return node


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


class _Noted(Pass):
    """Says when it runs; fails where it is told to."""

    def __init__(self, said: list[str], fails: str = "") -> None:
        self.said, self.fails = said, fails

    def _do(self, stage: str) -> None:
        self.said.append(stage)
        if stage == self.fails:
            raise PassError("as told")

    def requires(self, model: ir.Model) -> None:
        self._do("requires")

    def apply(self, model: ir.Model) -> None:
        self._do("apply")

    def ensures(self, model: ir.Model) -> None:
        self._do("ensures")


class _Second(_Noted):
    """Another name."""


@pytest.mark.parametrize("fails", ["requires", "apply", "ensures"])
def test_a_failure_names_the_pass_its_stage_and_those_before(fails: str) -> None:
    model = graph_of([value("x", 1)], [mark("Probe", "p", [value("y", 1)])])
    said: list[str] = []
    with pytest.raises(PassError, match=f"^_Second.{fails} after _Noted, _Noted: as told"):
        run_passes(model, [_Noted(said), _Noted(said), _Second(said, fails), _Noted(said)])
    stages = ["requires", "apply", "ensures"]
    assert said == stages * 2 + stages[: stages.index(fails) + 1]
    with pytest.raises(PassError, match=r"^_Second\.apply after the export: as told"):
        run_passes(model, [_Second(said, "apply")])


def test_a_mark_that_is_left_is_named() -> None:
    model = graph_of([value("x", 1)], [mark("Linear", "lm_head", [value("x", 1)])])
    assert [node.op_type for node in marks(model, "Linear", "Probe")] == ["Linear"]
    none_left(model, "Probe")
    with pytest.raises(PassError, match="Linear lm_head is left"):
        none_left(model, "Linear", "Probe")


def test_probes_name_values_and_go() -> None:
    x = value("x", 1, "n", 8)
    first = ir.node("Relu", [x])
    probe = mark("Probe", "probe.hidden.0", [first.outputs[0]])
    last = ir.node("Neg", [probe.outputs[0]])
    model = graph_of([x], [first, probe, last])
    run_passes(model, [NameProbes()])
    assert kinds(model) == ["Relu", "Neg"]
    assert first.outputs[0].name == "probe.hidden.0"
    assert last.inputs[0] is first.outputs[0]


def test_two_probes_of_one_name_are_refused() -> None:
    x = value("x", 1, "n", 8)
    first = mark("Probe", "p", [x])
    model = graph_of([x], [first, mark("Probe", "p", [first.outputs[0]])])
    with pytest.raises(PassError, match=r"NameProbes.requires after the export: two probes share a name"):
        run_passes(model, [NameProbes()])


def embedding() -> ir.Model:
    ids, weight = value("ids", 1, "n", dtype=ir.DataType.INT64), value("model.embed_tokens.weight", 10, 8)
    return graph_of([ids], [mark("Embedding", "model.embed_tokens", [ids, weight])], [weight])


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize(("scheme", "found"), [(Scheme.FLOAT, ["Gather"]), (Scheme.W8A16, ["Gather", "Cast", "Mul"])])
def test_embeddings_are_looked_up_in_standard_operators(scheme: Scheme, found: list[str], purpose: Purpose) -> None:
    model = embedding()
    run_passes(model, [LowerEmbeddings(QuantizationPlan({"model.embed_tokens": scheme}, {}), purpose)])
    assert set(found) <= set(kinds(model))
    assert not marks(model, "Embedding")
    assert {node.domain for node in model.graph} == {""}
    held = model.graph.initializers
    if scheme is Scheme.W8A16 and for_tensorrt(purpose):  # it lets DequantizeLinear alone read int8
        words = held["model.embed_tokens.weight_int8_words"]
        assert (words.dtype, tuple(words.shape or ())) == (ir.DataType.INT32, (10, 2))
    elif scheme is Scheme.W8A16:
        assert held["model.embed_tokens.weight_int8"].dtype is ir.DataType.INT8
    if scheme is Scheme.W8A16:
        assert tuple(held["model.embed_tokens.weight_scale"].shape or ()) == (10,)


@pytest.mark.parametrize("purpose", Purpose)
def test_norms_are_what_numpy_computes(purpose: Purpose, tmp_path: Path) -> None:
    x = value("x", 1, "n", 8)
    weights = np.linspace(0.5, 2, 8).astype(np.float32)
    weight = value("model.norm.weight", 8)
    weight.const_value = ir.tensor(weights, name="model.norm.weight")
    node = ir.node("RMSNorm", [x, weight], attributes={"name": "model.norm", "epsilon": 1e-2}, domain=DOMAIN)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", FLOAT, ir.Shape([1, "n", 8])
    model = graph_of([x], [node], [weight])
    run_passes(model, [LowerNorms(purpose)])
    own = purpose in (Purpose.ROWS, Purpose.TOKEN)
    assert ("SimplifiedLayerNormalization" in kinds(model)) == own
    assert ("RMSNormalization" in kinds(model)) == (purpose is Purpose.TENSORRT)
    model.opset_imports[""] = opset(purpose)
    ir.save(model, tmp_path / "norm.onnx")
    given = np.random.default_rng(0).normal(0, 0.2, (1, 5, 8)).astype(np.float32)
    session: Any = load_graph(tmp_path / "norm.onnx", 1)
    found = session.run(None, {"x": given})[0]
    wanted = given / np.sqrt((given.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-2) * weights
    assert np.abs(found - wanted).max() < 1e-6


def attention(inputs: int = 8) -> ir.Model:
    flat = [value(name, 1, "n", width) for name, width in (("q", 16), ("k", 8), ("v", 8))]
    past = [value(f"past_{name}_0", 1, 2, 32, 4) for name in ("key", "value")]
    last, total = value("last_token", 1, dtype=ir.DataType.INT32), value("total_tokens", dtype=ir.DataType.INT32)
    bias = value("attention_bias", 1, 1, "n", "t")
    given = [*flat, *past, last, total, bias]
    node = mark("Attention", "model.layers.0.self_attn", given[:inputs], 3, num_heads=4, kv_num_heads=2)
    return graph_of(given, [node])


@pytest.mark.parametrize("cache", CacheScheme)
def test_attention_in_place_is_one_operator(cache: CacheScheme) -> None:
    name = "model.layers.0.self_attn"
    plan = QuantizationPlan({}, {}, cache, {f"{name}.key": 127.0, f"{name}.value": 254.0})
    model = attention()
    run_passes(model, [AttendInPlace(plan)])
    (node,) = (node for node in model.graph if node.op_type != "Constant")
    assert (node.domain, node.op_type) == (CONTRIB, "GroupQueryAttention")
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    assert attributes["do_rotary"] == 0
    assert (attributes["num_heads"], attributes["kv_num_heads"]) == (4, 2)
    assert ("kv_cache_bit_width" in attributes) == (cache is CacheScheme.INT8)
    if cache is CacheScheme.INT8:
        made = [x.producer() for x in node.inputs[-2:] if x is not None]
        scales = [found.attributes["value"].as_tensor().numpy().tolist() for found in made if found is not None]
        assert scales == [[1.0], [2.0]]


@pytest.mark.parametrize("cache", CacheScheme)
def test_portable_attention_is_standard_and_grows_the_cache(cache: CacheScheme) -> None:
    name = "model.layers.0.self_attn"
    plan = QuantizationPlan({}, {}, cache, {f"{name}.key": 1.0, f"{name}.value": 2.0})
    model = attention()
    run_passes(model, [AttendStandard(plan, 4)])
    assert {node.domain for node in model.graph} == {""}
    assert [x.name for x in model.graph.inputs][-2:] == ["past_value_0", "attention_bias"]
    shapes = {
        x.name: [str(size) for size in x.shape or ()] for x in model.graph.inputs if str(x.name).startswith("past")
    }
    assert shapes == {f"past_{part}_0": ["1", "2", "past", "4"] for part in ("key", "value")}
    assert all([str(size) for size in x.shape or ()] == ["1", "2", "total", "4"] for x in model.graph.outputs[1:])
    counted = kinds(model).count("QuantizeLinear"), kinds(model).count("DequantizeLinear")
    assert counted == ((2, 2) if cache is CacheScheme.INT8 else (0, 0))


def test_attention_in_a_buffer_updates_16_bit_caches() -> None:
    model = attention()
    run_passes(model, [AttendInBuffer(4)])
    assert {node.domain for node in model.graph} == {""}
    assert [x.name for x in model.graph.inputs][-2:] == ["attention_bias", "write_at"]
    found = kinds(model)
    assert (found.count("TensorScatter"), found.count("Attention")) == (2, 1)
    caches = [*(x for x in model.graph.inputs if str(x.name).startswith("past")), *model.graph.outputs[1:]]
    assert len(caches) == 4
    assert {x.dtype for x in caches} == {ir.DataType.FLOAT16}
    assert {tuple(x.shape or ()) for x in caches[:2]} == {(1, 2, 32, 4)}


def test_attention_in_a_buffer_checks_its_inputs_and_leaves_other_graphs_alone() -> None:
    with pytest.raises(PassError, match=r"AttendInBuffer\.requires after the export: .* has 7 inputs, not 8"):
        run_passes(attention(7), [AttendInBuffer(4)])
    x = value("x", 1, "n", 8)
    model = graph_of([x], [ir.node("Relu", [x])])
    run_passes(model, [AttendInBuffer(4)])
    assert [x.name for x in model.graph.inputs] == ["x"]


def test_what_nothing_reads_goes() -> None:
    x = value("x", 1, "n", 8)
    last = ir.node("Relu", [x])
    unread = ir.node("Neg", [x])
    model = graph_of([x], [unread, ir.node("Abs", [unread.outputs[0]]), last])
    model.graph.outputs[:] = [last.outputs[0]]
    run_passes(model, [RemoveUnused()])
    assert kinds(model) == ["Relu"]


def test_int32_words_hold_the_same_bytes(tmp_path: Path) -> None:
    """Every pair of neighbouring bytes, the lowest and the highest ones among them."""
    rows = np.stack(np.meshgrid(np.arange(-128, 128), np.arange(-128, 128)), -1).astype(np.int8).reshape(256, 512)
    ids, weight = value("ids", 1, "n", dtype=ir.DataType.INT64), value("model.embed_tokens.weight", 256, 512)
    model = graph_of([ids], [mark("Embedding", "model.embed_tokens", [ids, weight])], [weight])
    plan = QuantizationPlan({"model.embed_tokens": Scheme.W8A16}, {})
    run_passes(model, [LowerEmbeddings(plan, Purpose.TENSORRT)])
    graph = model.graph
    del graph.initializers["model.embed_tokens.weight"]
    for name, array in (("int8_words", rows.view("<i4")), ("scale", np.ones(256, np.float32))):
        graph.initializers[f"model.embed_tokens.weight_{name}"].const_value = ir.tensor(array)
    ir.save(model, tmp_path / "words.onnx")
    session: Any = load_graph(tmp_path / "words.onnx", 1)
    found = session.run(None, {"ids": np.arange(256)[None]})[0]
    assert np.array_equal(found[0], rows.astype(np.float32))


def test_portable_attention_checks_its_inputs() -> None:
    with pytest.raises(PassError, match=r"AttendStandard\.requires after the export: .* has 7 inputs, not 8"):
        run_passes(attention(7), [AttendStandard(SHARED, 4)])


def test_portable_graphs_may_hold_nothing_of_onnx_runtimes_own() -> None:
    x = value("x", 1, "n", 8)
    model = graph_of([x], [ir.node("QMoE", [x], domain=CONTRIB)])
    with pytest.raises(PassError, match="an operator of ONNX Runtime's own is in the portable graph"):
        run_passes(model, [AttendStandard(SHARED, 4)])


@pytest.fixture
def planned(small_config: ModelConfig) -> Callable[[Scheme], tuple[QuantizationPlan, Layout]]:
    def make(scheme: Scheme) -> tuple[QuantizationPlan, Layout]:
        names = product_names(small_config)
        plan = QuantizationPlan(dict.fromkeys(names, scheme), dict.fromkeys(names, 1.0))
        return plan, plan_layout(small_config, plan)

    return make


def test_a_mark_that_the_plan_does_not_know_is_a_defect(
    small_config: ModelConfig, planned: Callable[[Scheme], Any]
) -> None:
    plan, layout = planned(Scheme.FLOAT)
    x = value("x", 1, "n", 8)
    model = graph_of([x], [mark("Linear", "model.layers.0.mlp.gate", [x, value("w", 4, 8)])])
    with pytest.raises(PassError, match=r"LowerProducts.requires .*no scheme for model.layers.0.mlp.gate$"):
        run_passes(model, [LowerProducts(small_config, plan, layout, Purpose.ROWS)])


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("scheme", Scheme)
def test_products_of_one_input_round_it_once_where_the_scale_is_a_tokens(
    small_config: ModelConfig, planned: Callable[[Scheme], Any], purpose: Purpose, scheme: Scheme
) -> None:
    plan, layout = planned(scheme)
    x = value("x", 1, "n", 48)
    nodes, held = [], []
    for part in ("q", "k", "v"):
        weight = value(f"model.layers.0.self_attn.{part}_proj.weight", 48, 48)
        held.append(weight)
        nodes.append(mark("Linear", f"model.layers.0.self_attn.{part}_proj", [x, weight]))
    nodes.append(ir.node("Sum", [node.outputs[0] for node in nodes]))
    model = graph_of([x], nodes, held)
    run_passes(model, [LowerProducts(small_config, plan, layout, purpose)])
    found = kinds(model)
    dynamic = purpose is Purpose.ROWS and scheme in (Scheme.W8A8_DYNAMIC, Scheme.W8A16)
    fixed = purpose is not Purpose.TOKEN and scheme is Scheme.W8A8
    # With a fixed scale each rounds it itself: ONNX Runtime's precise mode fuses no product that shares the node.
    assert found.count("QuantizeLinear") == int(dynamic) + 3 * int(fixed)
    assert found.count("ReduceMax") == int(dynamic)
    bits = scheme is not Scheme.FLOAT and purpose is Purpose.TOKEN
    bits = bits or (purpose is Purpose.ROWS and scheme is Scheme.W8A16_BLOCK)
    assert found.count("MatMulNBits") == 3 * bits
    assert found.count("QGemm") == 3 * dynamic
    assert found.count("Gemm") == 3 * (not bits and not dynamic)


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("scheme", Scheme)
def test_the_experts_function_says_what_it_takes(purpose: Purpose, scheme: Scheme) -> None:
    function = experts_function(Shape(3, 1, 32, 16), scheme, purpose, "7")
    assert function.name.endswith("Experts7")
    names = [x.name for x in function.inputs]
    assert names[:2] == ["x", "weights"]
    assert ("input_scale" in names) == (scheme is Scheme.W8A8)
    assert names.count("gate_up_2_values") == 1
    assert ("down_1_scale" in names) == (scheme is not Scheme.FLOAT)
    assert len(names) == len(set(names))
    assert len(function.outputs) == 1
    if purpose in (Purpose.PORTABLE, Purpose.TENSORRT):
        assert {node.domain for node in function} == {""}


def test_weights_are_attached_by_name_and_idle_ones_go(
    small_config: ModelConfig, planned: Callable[[Scheme], Any], tmp_path: Path
) -> None:
    _, layout = planned(Scheme.W8A8)
    x = value("x", "n", 48)
    model = graph_of([x], [ir.node("Identity", [x])])
    graph = model.graph
    initializer(graph, "idle", ir.DataType.FLOAT, [3])
    zero = filled(graph, "zero", np.zeros(3, np.int8))
    used = initializer(graph, "model.layers.0.mlp.up_proj.weight_int8_bits", ir.DataType.UINT8, [56, 48])
    assert initializer(graph, str(used.name), ir.DataType.UINT8, [56, 48]) is used
    assert filled(graph, "zero", np.ones(3, np.int8)) is zero
    emit = Emitter("extra")
    emit("Sum", used, zero)
    graph.extend(emit.nodes)
    run_passes(model, [AttachWeights(layout, tmp_path / "model.weights")])
    assert set(graph.initializers) == {"zero", used.name}
    held = used.const_value
    assert isinstance(held, ir.ExternalTensor)
    stored = layout.tensors["model.layers.0.mlp.up_proj.weight_int8"]
    assert (held.location, held.offset, held.length) == ("model.weights", stored.offset, stored.length)
    assert held.dtype is ir.DataType.UINT8  # the same bytes, read unsigned


def test_a_weight_that_is_not_laid_out_is_a_defect(planned: Callable[[Scheme], Any], tmp_path: Path) -> None:
    _, layout = planned(Scheme.FLOAT)
    x, weight = value("x", 1, 3), value("model.layers.9.weight", 3, 3)
    model = graph_of([x], [ir.node("MatMul", [x, weight])], [weight])
    with pytest.raises(PassError, match=r"AttachWeights.requires .*the layout has no model.layers.9.weight"):
        run_passes(model, [AttachWeights(layout, tmp_path / "w")])


def test_qmoe_takes_the_largest_block_that_divides_both_widths() -> None:
    blocks = {(64, 48): 16, (256, 384): 128, (48, 20): None, (320, 192): 64, (1536, 1408): 128}
    for (hidden, inner), block in blocks.items():
        shape = Shape(4, 2, hidden, inner)
        assert shape.block(Scheme.W8A16) == block
        assert shape.block(Scheme.W8A16_BLOCK) == (block if block == 128 else None)
    assert msgspec.to_builtins(list(Purpose)) == ["portable", "trt", "rows", "token"]
