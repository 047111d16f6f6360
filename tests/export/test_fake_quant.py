"""The torch model computing as INT8: against ONNX Runtime, torch's own fake quantization and a plain NumPy mixture."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from sonoedge.errors import SonoEdgeError
from sonoedge.export.fake_quant import fake_quantized, fake_quantized_weight, round_rows, round_to
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM, ModelOutput
from sonoedge.export.models.loading import init_model
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.quantize import products
from sonoedge.export.scheme import CacheScheme, QuantizationPlan, Scheme, quantize_weight

pytestmark = pytest.mark.usefixtures("one_thread")
Floats = npt.NDArray[np.float32]
EXPERTS = "model.layers.1.moe.experts"
IDS = torch.tensor([[5, 9, 89, 89, 12, 40, 7]])
POSITIONS = torch.arange(7).expand(3, 1, 7)
GRIDS = [(1, 2, 4)]


def plan_of(model: EchoVLM, scheme: Scheme, *, only: tuple[str, ...] = ("",), cache: bool = False) -> QuantizationPlan:
    """A plan with a threshold of its own for every input, low enough that some values saturate."""
    linears, mixtures = products(model)
    names = [*linears, *mixtures, "lm_head"]
    inputs = [*names, *(f"{name}.{expert}.down_proj" for name in mixtures for expert in range(5))]
    caches = [f"model.layers.{layer}.self_attn.{part}" for layer in range(2) for part in ("key", "value")]
    return QuantizationPlan(
        schemes={name: scheme if name.startswith(only) else Scheme.FLOAT for name in names},
        input_maximum={name: 1.0 + 0.01 * number for number, name in enumerate(inputs)},
        cache=CacheScheme.INT8 if cache else CacheScheme.FLOAT,
        cache_maximum={name: 0.4 + 0.1 * number for number, name in enumerate(caches)},
    )


@torch.no_grad()
def run(model: EchoVLM) -> ModelOutput:
    patches = torch.randn(8, 1176, generator=torch.Generator().manual_seed(3))
    embeds = model.encode_images(patches, GRIDS)
    output: ModelOutput = model(IDS, POSITIONS, image_embeds=embeds, collect_hidden=True)
    return output


def seen_by(model: EchoVLM, names: list[str]) -> dict[str, tuple[Floats, Floats]]:
    """Input and output of the modules of these names in one run."""
    seen: dict[str, tuple[Floats, Floats]] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], result: Any) -> None:
            output = result[0] if isinstance(result, tuple) else result
            seen[name] = arguments[0].numpy(), output.numpy()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    run(model)
    for handle in handles:
        handle.remove()
    return seen


def onnx_product(x: Floats, weight: Floats, scale: float) -> Floats:
    """x · weightᵀ by ONNX Runtime, with QuantizeLinear and DequantizeLinear around x and int8 weights."""
    int8, scales = quantize_weight(weight)
    constants = {
        "scale": np.float32(scale),
        "zero": np.int8(0),
        "int8": np.ascontiguousarray(int8.T),
        "scales": scales,
        "zeros": np.zeros(len(scales), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"]),
        helper.make_node("DequantizeLinear", ["int8", "scales", "zeros"], ["w"], axis=1),
        helper.make_node("MatMul", ["dq", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.x64quantprecision", "1")  # as the runtime: no saturating 16-bit sums
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return np.asarray(y)


def dequantized(weight: Tensor) -> Floats:
    int8, scales = quantize_weight(weight.detach().numpy())
    return (int8 * scales[:, None]).astype(np.float32)


def relative(found: Floats, wanted: Floats) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("visual.patch_embed.proj", "visual.patch_embed"),
        ("visual.merger.mlp.2", "visual.merger.mlp.2"),
        ("visual.blocks.1.attn.qkv", "visual.blocks.1.attn.qkv"),
        ("model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.o_proj"),
        ("model.layers.0.mlp.down_proj", "model.layers.0.mlp.down_proj"),
        ("model.layers.0.moe.shared_expert.up_proj", "model.layers.0.moe.shared_expert.up_proj"),
    ],
)
def test_a_static_product_is_what_onnx_runtime_computes(small_model: EchoVLM, name: str, module: str) -> None:
    plan = plan_of(small_model, Scheme.W8A8)
    with fake_quantized(small_model, plan):
        x, y = seen_by(small_model, [module])[module]
    linear = small_model.get_submodule(name)
    assert isinstance(linear, nn.Linear | nn.Conv3d)
    weight = linear.weight.detach().flatten(1).numpy()
    bias = 0 if linear.bias is None else linear.bias.detach().numpy()
    wanted = onnx_product(x, weight, plan.activation_scale(name)) + bias
    error = relative(y, wanted)
    print(f"largest relative error {error:.1e}")
    assert error < 1e-5
    assert relative(x @ weight.T + bias, wanted) > 1e-3  # without rounding, it is another number


def test_the_head_is_what_onnx_runtime_computes(small_config: ModelConfig, one_thread: None) -> None:
    """The last hidden state that a caller sees stays float, and so does the lookup of a tied embedding."""
    for tied in (False, True):
        model = init_model(msgspec.structs.replace(small_config, tie_word_embeddings=tied), seed=5, std=0.15)
        before = run(model)
        plan = plan_of(model, Scheme.W8A8, only=("lm_head",))
        with fake_quantized(model, plan):
            output = run(model)
        assert before.hidden_states is not None
        assert output.hidden_states is not None
        assert torch.equal(before.hidden_states[-1], output.hidden_states[-1])
        head = model.model.embed_tokens if tied else model.lm_head
        weight = head.weight.detach().numpy()
        hidden = before.hidden_states[-1].numpy()
        assert relative(output.logits.numpy(), onnx_product(hidden, weight, plan.activation_scale("lm_head"))) < 1e-5


@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W8A16])
def test_experts_token_by_token(small_model: EchoVLM, scheme: Scheme) -> None:
    """Each token alone through the experts that it chose, the hidden activation rounded in the expert's own range."""
    plan = plan_of(small_model, scheme, only=("model.layers.1.moe.experts",))
    moe = small_model.get_submodule("model.layers.1.moe")
    assert isinstance(moe, SparseMoE)
    with fake_quantized(small_model, plan):
        x, y = seen_by(small_model, ["model.layers.1.moe"])["model.layers.1.moe"]

    def through(values: Floats, name: str) -> Floats:
        if scheme is Scheme.W8A16:
            return values
        scale = np.float32(plan.activation_scale(name) if scheme is Scheme.W8A8 else np.abs(values).max() / 127)
        return np.asarray(np.clip(np.rint(values / scale), -128, 127) * scale, np.float32)

    with torch.no_grad():
        router = torch.softmax(moe.gate(torch.from_numpy(x)), -1).numpy()  # [1, S, experts]
        tokens = torch.from_numpy(x)
        shared = (torch.sigmoid(moe.shared_expert_gate(tokens)) * moe.shared_expert(tokens)).numpy()
    wanted = shared.copy()
    for row in range(x.shape[1]):
        rounded = through(x[0, row], EXPERTS)
        for expert in np.argsort(router[0, row])[-2:]:
            gate, up, down = (dequantized(p) for p in moe.experts[int(expert)].parameters())
            gated = gate @ rounded
            hidden = through(gated / (1 + np.exp(-gated)) * (up @ rounded), f"{EXPERTS}.{expert}.down_proj")
            wanted[0, row] += router[0, row, expert] * (down @ hidden)
    error = relative(y, wanted)
    print(f"largest relative error {error:.1e}")
    assert error < 1e-5


def test_dynamic_inputs_have_a_scale_a_token(small_model: EchoVLM) -> None:
    name = "model.layers.0.mlp.gate_proj"
    with fake_quantized(small_model, plan_of(small_model, Scheme.W8A8_DYNAMIC)):
        x, y = seen_by(small_model, [name])[name]
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
    rounded = np.rint(x / scale) * scale
    weight = dequantized(small_model.get_submodule(name).get_parameter("weight"))
    assert relative(y, rounded @ weight.T) < 1e-5
    assert not round_rows(torch.tensor([[0.0, 0.0], [1.0, 2.0]]))[0].any()


def test_weight_only_leaves_inputs_alone(small_model: EchoVLM) -> None:
    name = "model.layers.1.mlp.down_proj"
    with fake_quantized(small_model, plan_of(small_model, Scheme.W8A16, only=(name,))):
        x, y = seen_by(small_model, [name])[name]
    weight = dequantized(small_model.get_submodule(name).get_parameter("weight"))
    assert relative(y, x @ weight.T) < 1e-6


@given(st.integers(1, 4), st.integers(1, 300), st.sampled_from([None, 128]), st.integers(0, 9), st.floats(1e-40, 1e30))
def test_weights_round_bit_for_bit_as_in_the_bundle(
    rows: int, columns: int, block: int | None, seed: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((rows, columns)) * size).astype(np.float32)
    weight[0] = 0
    int8, scales = quantize_weight(weight, block)
    wide = scales[:, None] if block is None else np.repeat(scales, block, axis=1)[:, :columns]
    assert np.array_equal(fake_quantized_weight(torch.from_numpy(weight), block).numpy(), int8 * wide)


def test_rounding_and_its_gradient_are_torchs_own() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 2
    scale = 2.0**-6  # a power of two: torch multiplies by the reciprocal, which only then is exact
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = round_to(mine, torch.tensor([scale]))
    wanted = torch.fake_quantize_per_tensor_affine(theirs, scale, 0, -128, 127)
    assert torch.equal(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert mine.grad is not None
    assert theirs.grad is not None
    assert torch.equal(mine.grad, theirs.grad)
    assert 0 < int((mine.grad == 0).sum()) < 1000


def test_the_cache_holds_rotated_keys_and_values_in_int8(small_model: EchoVLM) -> None:
    taken: list[tuple[Tensor, Tensor, Tensor]] = []
    layer = small_model.get_submodule("model.layers.1.self_attn")
    x = torch.randn(1, 3, 48, generator=torch.Generator().manual_seed(1))
    cos, sin = torch.full((1, 3, 8), 0.6), torch.full((1, 3, 8), 0.8)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taken.append((q, k, v))
        return q

    with torch.no_grad():
        layer(x, cos, sin, attend)
        with fake_quantized(small_model, plan_of(small_model, Scheme.FLOAT, cache=True)):
            layer(x, cos, sin, attend)
    (q, k, v), (q8, k8, v8) = taken
    assert torch.equal(q, q8)
    for wide, rounded, threshold in ((k, k8, 0.6), (v, v8, 0.7)):
        scale = np.float32(threshold / 127)
        levels = np.clip(np.rint(wide.numpy() / scale), -128, 127)
        assert np.array_equal(rounded.numpy(), levels * scale)
        assert (np.abs(levels) >= 127).any()


def test_nothing_is_left_of_it(small_model: EchoVLM) -> None:
    before, state = run(small_model), {key: value.clone() for key, value in small_model.state_dict().items()}
    plan = plan_of(small_model, Scheme.W8A8, cache=True)
    with pytest.raises(KeyboardInterrupt), fake_quantized(small_model, plan):
        assert not torch.equal(run(small_model).logits, before.logits)
        raise KeyboardInterrupt
    assert torch.equal(run(small_model).logits, before.logits)
    assert all(torch.equal(value, state[key]) for key, value in small_model.state_dict().items())
    with fake_quantized(small_model, plan_of(small_model, Scheme.FLOAT)):
        assert torch.equal(run(small_model).logits, before.logits)


def test_straight_through_gives_every_parameter_a_gradient(small_model: EchoVLM) -> None:
    plan = plan_of(small_model, Scheme.W8A8, cache=True)
    with fake_quantized(small_model, plan):
        fixed = run(small_model).logits
    with fake_quantized(small_model, plan, straight_through=True):
        assert torch.equal(run(small_model).logits, fixed)
        embeds = small_model.encode_images(torch.ones(8, 1176), GRIDS)
        small_model(IDS, POSITIONS, image_embeds=embeds).logits.square().sum().backward()
        with torch.no_grad():
            small_model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.5)
        assert not torch.equal(run(small_model).logits, fixed)  # what training changes is seen at once
    for name, parameter in small_model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_what_calibration_never_saw_is_named(small_model: EchoVLM) -> None:
    plan = plan_of(small_model, Scheme.W8A8, cache=True)
    hole = {name: value for name, value in plan.input_maximum.items() if name != f"{EXPERTS}.3.down_proj"}
    before = run(small_model).logits
    with (
        pytest.raises(SonoEdgeError, match=r"model\.layers\.1\.moe\.experts\.3\.down_proj"),
        fake_quantized(small_model, msgspec.structs.replace(plan, input_maximum=hole)),
    ):
        pass
    with (
        pytest.raises(SonoEdgeError, match=r"model\.layers\.0\.self_attn\.key"),
        fake_quantized(small_model, msgspec.structs.replace(plan, cache_maximum={})),
    ):
        pass
    assert torch.equal(run(small_model).logits, before)
