"""The oracle agrees with what it did not help to write: the torch mixture with fake quantization, and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from sonoedge.export import fake_quant
from sonoedge.export.models.config import MoEConfig
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.plugins import oracle
from sonoedge.export.plugins.dispatch import Activation, Experts
from sonoedge.export.scheme import INT8_MAX, QuantizationPlan, Scheme

Array = npt.NDArray[Any]
HIDDEN, INNER, COUNT = 48, 32, 5
NAME = "experts"
INPUT_SCALE, HIDDEN_SCALES = 2.0**-5, [2.0 ** -(3 + expert % 3) for expert in range(COUNT)]


def integers(seed: int, rows: int, columns: int) -> Array:
    """int8 weights whose rows all reach 127, so that their scale is what the test says."""
    values = np.random.default_rng(seed).integers(-127, 128, (rows, columns), np.int8)
    values[:, 0] = 127
    return values


def mixture(chosen: int, norm: bool) -> tuple[SparseMoE, dict[str, Array]]:
    """The torch module with weights that are integers times powers of two, and those integers and scales."""
    moe = SparseMoE(HIDDEN, MoEConfig(chosen, INNER, INNER, num_experts=COUNT, norm_topk_prob=norm))
    gate_up = np.stack([integers(expert, 2 * INNER, HIDDEN) for expert in range(COUNT)])
    down = np.stack([integers(50 + expert, HIDDEN, INNER) for expert in range(COUNT)])
    rng = np.random.default_rng(9)
    gate_up_scale = 2.0 ** rng.integers(-10, -7, (COUNT, 2 * INNER)).astype(np.float32)
    down_scale = 2.0 ** rng.integers(-12, -9, (COUNT, HIDDEN)).astype(np.float32)
    with torch.no_grad():
        for expert, module in enumerate(moe.experts):
            gate, up = np.split(gate_up[expert] * gate_up_scale[expert][:, None], 2)
            weights = (gate, up, down[expert] * down_scale[expert][:, None])
            for part, weight in zip(("gate_proj", "up_proj", "down_proj"), weights, strict=True):
                module.get_submodule(part).get_parameter("weight").copy_(torch.from_numpy(weight))
        moe.gate.weight.copy_(torch.randn(COUNT, HIDDEN, generator=torch.Generator().manual_seed(3)) / 8)
        moe.shared_expert.get_submodule("down_proj").get_parameter("weight").zero_()  # routed experts alone
    stored = {"gate_up_values": gate_up, "gate_up_scale": gate_up_scale, "down_values": down, "down_scale": down_scale}
    return moe, stored


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("chosen", [1, 2, COUNT])
@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W8A16])
def test_the_operators_together_are_the_quantized_mixture(scheme: Scheme, chosen: int, norm: bool) -> None:
    moe, stored = mixture(chosen, norm)
    experts = Experts(COUNT, chosen, HIDDEN, INNER, norm, block_rows=16)
    x = torch.randn(37, HIDDEN, generator=torch.Generator().manual_seed(4)).half().float()
    largest = {NAME: INPUT_SCALE * INT8_MAX}
    largest |= {f"{NAME}.{e}.down_proj": scale * INT8_MAX for e, scale in enumerate(HIDDEN_SCALES)}
    plan = QuantizationPlan({NAME: scheme}, largest)
    with torch.no_grad():
        forward = fake_quant._experts(NAME, moe, plan, straight_through=False)
        expected, logits = (each.numpy() for each in forward(x))
    if scheme is Scheme.W8A8:
        input_scale, hidden_scale = np.array([INPUT_SCALE], np.float32), np.array(HIDDEN_SCALES, np.float32)
        routed = oracle.route(x.numpy(), logits, input_scale, experts)
        gate_up = (stored["gate_up_values"], stored["gate_up_scale"])
        hidden = oracle.up(
            routed.x_int8, *gate_up, input_scale, hidden_scale, routed.block_expert, routed.slot_token, experts
        )
        down = (stored["down_values"], stored["down_scale"], hidden_scale)
        parts = oracle.down(hidden, *down, routed.block_expert, routed.slot_weight, experts, "float16")
        found = oracle.summed(parts, routed.token_slot, "float16")
    else:
        wide = oracle.up_decode(
            x.numpy(), logits, stored["gate_up_values"], stored["gate_up_scale"], experts, "float16"
        )
        found = oracle.down_decode(wide, logits, stored["down_values"], stored["down_scale"], experts, "float16")
    # torch computes in float32; the oracle rounds each part and the sum, or the inner activation, to float16.
    largest_error = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"largest error {largest_error:.1e} of the largest value")
    assert largest_error < 2.0**-10
    assert np.abs(expected).max() > 0.5


def test_quantized_is_quantize_linear() -> None:
    rng = np.random.default_rng(0)
    ties = (np.arange(-300, 301) / 2).astype(np.float32)
    values = np.concatenate([ties * np.float32(0.37), rng.normal(scale=30, size=4096)]).astype(np.float32)
    for scale in (0.37, 2.0**-4, 0.011, 3.0):
        step = np.array(scale, np.float32)
        node = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])
        (found,) = run(node, {"x": values, "scale": step, "zero": np.array(0, np.int8)}, TensorProto.INT8)
        np.testing.assert_array_equal(oracle.quantized(values, np.float32(scale)), found)


def test_equal_logits_are_chosen_as_top_k_does() -> None:
    logits = np.random.default_rng(1).integers(-2, 3, (200, 7)).astype(np.float32)
    for chosen in (1, 3, 7):
        node = helper.make_node("TopK", ["x", "k"], ["largest", "y"])
        (index,) = run(node, {"x": logits, "k": np.array([chosen], np.int64)}, TensorProto.INT64)
        mask = np.zeros(logits.shape, np.bool_)
        np.put_along_axis(mask, index, True, axis=1)
        np.testing.assert_array_equal(oracle.chosen_experts(logits, chosen), mask)


@pytest.mark.parametrize("activation", ["float16", "bfloat16"])
def test_rounding_is_torchs(activation: Activation) -> None:
    values = np.random.default_rng(2).integers(0, 1 << 32, 1 << 16, np.uint64).astype(np.uint32).view(np.float32)
    values = values[np.isfinite(values) & (np.abs(values) < 6e4)]
    expected = torch.from_numpy(values).to(getattr(torch, activation)).float().numpy()
    np.testing.assert_array_equal(oracle.rounded(values, activation), expected)


def run(node: onnx.NodeProto, inputs: dict[str, Array], output: int) -> list[Array]:
    """Outputs of one node in ONNX Runtime."""
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
    ]
    graph = helper.make_graph([node], "one", values, [helper.make_tensor_value_info("y", output, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))
