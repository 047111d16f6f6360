"""Lowering: what int8 weights are, and that ONNX Runtime computes an int8 product and the experts as they are meant."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sonoedge.errors import SonoEdgeError
from sonoedge.export.graphs import OPSET
from sonoedge.export.lowering import INT8_MAX, QuantizationPlan, Scheme, lower, quantize_weight
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.config import MoEConfig
from sonoedge.export.models.moe import SparseMoE
from sonoedge.runtime.sessions.ort import _load

Floats = npt.NDArray[np.float32]
WEIGHTS = arrays.arrays(
    np.float32,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@given(WEIGHTS)
def test_int8_weights_are_the_nearest_and_symmetric(weight: Floats) -> None:
    int8, scale = quantize_weight(weight)
    assert int8.dtype == np.int8
    assert scale.dtype == np.float32
    assert scale.shape == (weight.shape[0],)
    assert (scale > 0).all()
    assert int8.min() >= -INT8_MAX
    wide = scale[:, None].astype(np.float64)
    assert (np.abs(weight - int8 * wide) <= 0.5001 * wide).all()
    mirrored, same_scale = quantize_weight(-weight)
    assert np.array_equal(mirrored, -int8)
    assert np.array_equal(same_scale, scale)
    largest = np.abs(weight).max(axis=1)
    assert (np.abs(int8).max(axis=1)[largest > 1e-30] == INT8_MAX).all()
    assert not int8[largest == 0].any()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(wrong: float) -> None:
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = wrong
    with pytest.raises(SonoEdgeError, match="a weight is not finite"):
        quantize_weight(weight)


@pytest.mark.parametrize("maximum", [None, 0.0, float("nan")])
def test_a_product_without_range_is_named(maximum: float | None) -> None:
    plan = QuantizationPlan({"lm_head": Scheme.W8A8}, {} if maximum is None else {"lm_head": maximum})
    with pytest.raises(SonoEdgeError, match="no range for 'lm_head'"):
        plan.activation_scale("lm_head")


def marked(op_type: str, inputs: dict[str, Floats], weights: dict[str, Floats], outputs: int) -> ir.Model:
    """A graph of one mark called `product`, over inputs [n, width] and initializers; gives [n, outputs]."""
    values = []
    for name, array in inputs.items():
        shape = ir.Shape(["n", array.shape[1]])
        values.append(ir.Value(name=name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT)))
    held = []
    for name, array in weights.items():
        value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=ir.tensor(array, name=name))
        value.type = ir.TensorType(ir.DataType.FLOAT)
        held.append(value)
    node = ir.node(op_type, [*values, *held], attributes={"name": "product"}, domain=DOMAIN)
    node.outputs[0].name = "y"
    node.outputs[0].shape, node.outputs[0].type = ir.Shape(["n", outputs]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        values, node.outputs, nodes=[node], initializers=held, opset_imports={"": OPSET, DOMAIN: 1}, name="one"
    )
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model, plan: QuantizationPlan, inputs: dict[str, Floats], folder: Path) -> Floats:
    """Lower the graph and run it as the runtime would."""
    lower(model, plan)
    path = folder / "one.onnx"
    ir.save(model, path)
    session: Any = _load(path, 1)
    result: Floats = session.run(None, inputs)[0]
    return result


def fake_quantized(x: Floats, maximum: float) -> Floats:
    scale = np.float32(maximum / INT8_MAX)
    seen: Floats = (np.clip(np.rint(x / scale), -128, 127) * scale).astype(np.float32)
    return seen


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("covered", [False, True])
def test_int8_product_equals_the_integer_oracle(tmp_path: Path, rows: int, bias: bool, covered: bool) -> None:
    rng = np.random.default_rng(rows)
    x = rng.normal(0, 1, (rows, 96)).astype(np.float32)
    weight = rng.normal(0, 0.3, (40, 96)).astype(np.float32)
    weights = {"weight": weight} | ({"bias": rng.normal(0, 1, 40).astype(np.float32)} if bias else {})
    maximum = float(np.abs(x).max()) if covered else 1.5  # inputs beyond the range saturate
    plan = QuantizationPlan({"product": Scheme.W8A8}, {"product": maximum})
    found = run(marked("Linear", {"x": x}, weights, 40), plan, {"x": x}, tmp_path)
    int8, scales = quantize_weight(weight)
    step = np.float32(maximum / INT8_MAX)
    levels = np.clip(np.rint(x / step), -128, 127).astype(np.int64)
    wanted = (levels @ int8.T.astype(np.int64)) * (np.float64(step) * scales) + weights.get("bias", 0.0)
    print("largest error:", np.abs(found - wanted).max())
    assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max()
    exact = x @ weight.T + weights.get("bias", 0.0)
    assert (np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.03) == covered


def test_int8_sums_do_not_saturate(tmp_path: Path) -> None:
    """Processors without VNNI add int8 products in 16 bits unless told not to: the largest ones would be cut off."""
    x, weight = np.full((3, 256), 1.0, np.float32), np.full((16, 256), 1.0, np.float32)
    weight[::2] = -1.0
    plan = QuantizationPlan({"product": Scheme.W8A8}, {"product": 1.0})
    found = run(marked("Linear", {"x": x}, {"weight": weight}, 16), plan, {"x": x}, tmp_path)
    assert np.abs(found - x @ weight.T).max() < 1e-3


def test_float_product_is_exact(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.normal(0, 1, (5, 24)).astype(np.float32), rng.normal(0, 1, (8, 24)).astype(np.float32)
    plan = QuantizationPlan({"product": Scheme.FLOAT}, {})
    found = run(marked("Linear", {"x": x}, {"weight": weight}, 8), plan, {"x": x}, tmp_path)
    assert np.abs(found - x @ weight.T).max() < 1e-5


@pytest.fixture
def moe() -> SparseMoE:
    """Five experts, two a token."""
    torch.manual_seed(4)
    made = SparseMoE(32, MoEConfig(2, 24, 16, num_experts=5))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0, 0.3)
    return made


def experts_graph(moe: SparseMoE, x: torch.Tensor) -> tuple[ir.Model, dict[str, Floats], Floats]:
    """The experts as one mark, its inputs, and what torch makes of them."""
    with torch.no_grad():
        weights = moe.route(moe.gate(x))
        hidden = moe.expert_hidden(x) * weights.unsqueeze(-1)
        down = torch.stack([expert.get_parameter("down_proj.weight") for expert in moe.experts])
        wanted = torch.einsum("nei,ehi->nh", hidden, down).numpy()
    inputs = {"x": x.numpy(), "weights": weights.numpy()}
    parts = ("gate_proj", "up_proj", "down_proj")
    matrices = {
        f"{n}.{part}": expert.get_parameter(f"{part}.weight").detach().numpy()
        for n, expert in enumerate(moe.experts)
        for part in parts
    }
    return marked("Experts", inputs, matrices, 32), inputs, wanted


def test_float_experts_equal_the_torch_mixture(tmp_path: Path, moe: SparseMoE) -> None:
    model, inputs, wanted = experts_graph(moe, torch.randn(11, 32))
    found = run(model, QuantizationPlan({"product": Scheme.FLOAT}, {}), inputs, tmp_path)
    print("largest error:", np.abs(found - wanted).max())
    assert np.abs(found - wanted).max() < 1e-5


def test_int8_experts_equal_their_oracle_and_stay_near_the_mixture(tmp_path: Path, moe: SparseMoE) -> None:
    x = torch.randn(11, 32)
    model, inputs, wanted = experts_graph(moe, x)
    with torch.no_grad():
        hidden = moe.expert_hidden(x).numpy()  # [n, experts, intermediate]
    maxima = {f"product.{n}.down_proj": float(np.abs(hidden[:, n]).max()) for n in range(5)}
    plan = QuantizationPlan({"product": Scheme.W8A8}, {"product": float(x.abs().max()), **maxima})
    found = run(model, plan, inputs, tmp_path)
    seen = fake_quantized(x.numpy(), plan.input_maximum["product"])
    oracle = np.zeros_like(wanted)
    for n, expert in enumerate(moe.experts):
        gate, up, down = (
            (int8 * scale[:, None]).astype(np.float32)
            for int8, scale in (
                quantize_weight(expert.get_parameter(f"{part}.weight").detach().numpy())
                for part in ("gate_proj", "up_proj", "down_proj")
            )
        )
        between = seen @ gate.T
        between = between / (1 + np.exp(-between)) * (seen @ up.T)
        oracle += inputs["weights"][:, n : n + 1] * (fake_quantized(between, maxima[f"product.{n}.down_proj"]) @ down.T)
    # A hidden value between two levels may fall to either side in the last digit, so the bound is a few levels' worth.
    print("largest error:", np.abs(found - oracle).max(), "from float:", np.abs(found - wanted).max())
    assert np.linalg.norm(found - oracle) / np.linalg.norm(oracle) < 2e-3
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


def test_an_expert_without_tokens_is_named(tmp_path: Path, moe: SparseMoE) -> None:
    model, _, _ = experts_graph(moe, torch.randn(3, 32))
    ranges = {"product": 1.0} | {f"product.{n}.down_proj": 1.0 for n in (0, 1, 2, 4)}
    with pytest.raises(SonoEdgeError, match=r"no range for 'product\.3\.down_proj'"):
        lower(model, QuantizationPlan({"product": Scheme.W8A8}, ranges))
