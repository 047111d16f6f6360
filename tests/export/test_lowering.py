"""Lowering: ONNX Runtime computes a product and the experts as meant, in every scheme and for every purpose."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.errors import SonoEdgeError
from sonoedge.export.graphs import OPSET
from sonoedge.export.layout import plan_layout
from sonoedge.export.lowering import lowered
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.config import ModelConfig, MoEConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, open_checkpoint, save_checkpoint
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.passes.products import Purpose
from sonoedge.export.quantize import product_names
from sonoedge.export.scheme import INT8_MAX, QuantizationPlan, Scheme, quantize_weight
from sonoedge.export.weight_file import write_weights
from sonoedge.runtime.sessions.ort import load_graph

Floats = npt.NDArray[np.float32]
DOWN, BIASED = "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.moe.experts"
FLOAT = ir.TensorType(ir.DataType.FLOAT)


@pytest.fixture(autouse=True)
def in_float16(without_bfloat16: Callable[[ir.Model], ir.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime has no products in bfloat16 on the CPU."""
    monkeypatch.setitem(RUNNABLE, "as", without_bfloat16)


RUNNABLE: dict[str, Callable[[ir.Model], ir.Model]] = {}


@pytest.fixture
def config(small_config: ModelConfig) -> ModelConfig:
    """One decoder layer, whose down projection has 48 rows of 96 inputs."""
    vision = msgspec.structs.replace(small_config.vision, depth=1, in_channels=1)
    moe = MoEConfig(2, 24, 16, num_experts=5)
    return msgspec.structs.replace(small_config, num_hidden_layers=1, intermediate_size=96, vision=vision, moe=moe)


def mark(op_type: str, name: str, inputs: dict[str, Floats], weights: dict[str, tuple[int, ...]], outputs: int) -> Any:
    """A graph of one mark over inputs [n, width] or [1, n, width] and weights of the checkpoint; gives y."""
    lead = [1] if next(iter(inputs.values())).ndim == 3 else []
    values = [ir.Value(name=key, shape=ir.Shape([*lead, "n", x.shape[-1]]), type=FLOAT) for key, x in inputs.items()]
    held = [ir.Value(name=key, shape=ir.Shape(shape), type=FLOAT) for key, shape in weights.items()]
    node = ir.node(op_type, [*values, *held], attributes={"name": name}, domain=DOMAIN)
    node.outputs[0].name, node.outputs[0].type = "y", FLOAT
    node.outputs[0].shape = ir.Shape([*lead, "n", outputs])
    opsets = {"": OPSET, DOMAIN: 1}
    graph = ir.Graph(values, node.outputs, nodes=[node], initializers=held, opset_imports=opsets, name="one")
    return ir.Model(graph, ir_version=10)


def run(
    graph: ir.Model, model: EchoVLM, plan: QuantizationPlan, purpose: Purpose, inputs: dict[str, Floats], folder: Path
) -> Floats:
    """Lower the graph over the model's weights and run it as the runtime would."""
    if not (folder / "checkpoint").exists():
        save_checkpoint(model, folder / "checkpoint")
    config, headers = open_checkpoint(folder / "checkpoint")
    layout = plan_layout(config, plan)
    work = folder / purpose.value
    work.mkdir()
    write_weights(work / "weights", layout, headers, Smoothing.none(), identity="")
    model_graph = RUNNABLE["as"](lowered(graph, config, plan, layout, work / "weights", purpose))
    ir.save(model_graph, work / "one.onnx")
    session: Any = load_graph(work / "one.onnx", 1)
    result: Floats = session.run(None, inputs)[0]
    return result


def plan_of(config: ModelConfig, name: str, scheme: Scheme, maxima: dict[str, float] | None = None) -> QuantizationPlan:
    schemes = dict.fromkeys(product_names(config), Scheme.FLOAT)
    assert name in schemes
    return QuantizationPlan(schemes | {name: scheme}, maxima or {})


class Product:
    """One product of a random model: its weights, and its graph run on an input."""

    def __init__(self, config: ModelConfig, name: str, folder: Path, scheme: Scheme) -> None:
        self.config, self.name, self.folder, self.scheme = config, name, folder, scheme
        self.model = init_model(config, seed=2, std=0.3).eval()
        self.linear = self.model.get_submodule(name)
        bias = getattr(self.linear, "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias, generator=torch.Generator().manual_seed(1))
        self.bias: Floats | float = 0.0 if bias is None else bias.detach().numpy()

    @property
    def weight(self) -> Floats:
        """[out, in]."""
        return np.asarray(self.linear.get_parameter("weight").detach().numpy(), np.float32)

    @property
    def int8(self) -> Floats:
        """The weights after int8."""
        values, scale = quantize_weight(self.weight, self.scheme.block)
        wide = scale[:, None]
        if self.scheme.block is not None:
            wide = np.repeat(scale, self.scheme.block, axis=1)[:, : values.shape[1]]
        return (values * wide.astype(np.float64)).astype(np.float32)

    def run(self, x: Floats, purpose: Purpose, maximum: float | None = None) -> Floats:
        """What the graph gives for x."""
        plan = plan_of(self.config, self.name, self.scheme, {} if maximum is None else {self.name: maximum})
        shapes = {f"{self.name}.weight": self.weight.shape}
        if isinstance(self.bias, np.ndarray):
            shapes[f"{self.name}.bias"] = self.bias.shape
        graph = mark("Linear", self.name, {"x": x}, shapes, len(self.weight))
        return run(graph, self.model, plan, purpose, {"x": x}, self.folder)


def fake_quantized(x: Floats, maximum: float) -> Floats:
    scale = np.float32(maximum / INT8_MAX)
    seen: Floats = (np.clip(np.rint(x / scale), -128, 127) * scale).astype(np.float32)
    return seen


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize("purpose", [Purpose.PORTABLE, Purpose.ROWS])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("name", [DOWN, BIASED])
@pytest.mark.parametrize("covered", [False, True])
def test_int8_product_equals_the_integer_oracle(
    config: ModelConfig, tmp_path: Path, purpose: Purpose, rows: int, name: str, covered: bool
) -> None:
    product = Product(config, name, tmp_path, Scheme.W8A8)
    x = normal(1, rows, product.weight.shape[1], seed=rows)
    maximum = float(np.abs(x).max()) if covered else 1.5  # inputs beyond the range saturate
    found = product.run(x, purpose, maximum)
    int8, scales = quantize_weight(product.weight)
    step = np.float32(maximum / INT8_MAX)
    levels = np.clip(np.rint(x / step), -128, 127).astype(np.int64)
    wanted = (levels @ int8.T.astype(np.int64)) * (np.float64(step) * scales) + product.bias
    assert (name == BIASED) == isinstance(product.bias, np.ndarray)
    print("largest error:", np.abs(found - wanted).max())
    assert np.abs(found - wanted).max() < 2e-6 * np.abs(wanted).max()
    exact = x @ product.weight.T + product.bias
    assert (np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.03) == covered


@pytest.mark.parametrize("columns", [96, 200])
def test_dynamic_product_equals_the_integer_oracle(config: ModelConfig, tmp_path: Path, columns: int) -> None:
    """Each token has a scale of its own, however small or large it is; a token of zeros stays one."""
    config = msgspec.structs.replace(config, intermediate_size=columns)
    product = Product(config, DOWN, tmp_path, Scheme.W8A8_DYNAMIC)
    x = normal(1, 6, columns) * np.array([1, 1e-3, 1e3, 0, 1e-30, 5], np.float32)[:, None]
    found = product.run(x, Purpose.ROWS)
    int8, scales = quantize_weight(product.weight)
    step = np.maximum(np.abs(x).max(-1, keepdims=True) * np.float32(1 / INT8_MAX), np.finfo(np.float32).tiny)
    levels = np.clip(np.rint(x / step), -128, 127).astype(np.int64)
    wanted = (levels @ int8.T.astype(np.int64)) * (step.astype(np.float64) * scales)
    for token in range(x.shape[1]):
        assert np.abs(found[0, token] - wanted[0, token]).max() <= 2e-6 * np.abs(wanted[0, token]).max()
    assert not found[0, 3].any()


# Smaller than a block, no multiple of 128, no multiple of 256, whole blocks.
WIDTHS = (96, 200, 300, 512)


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize("scheme", [Scheme.W8A16, Scheme.W8A16_BLOCK, Scheme.W8A8_DYNAMIC])
def test_weight_only_in_the_portable_graph_is_the_product_with_int8_weights(
    config: ModelConfig, tmp_path: Path, columns: int, scheme: Scheme
) -> None:
    config = msgspec.structs.replace(config, intermediate_size=columns)
    product = Product(config, DOWN, tmp_path, scheme)
    x = normal(1, 5, columns)
    found = product.run(x, Purpose.PORTABLE)
    assert np.abs(found - x @ product.int8.T).max() < 1e-5 * np.abs(found).max()


@pytest.mark.parametrize("columns", WIDTHS)
@pytest.mark.parametrize(
    ("purpose", "scheme"),
    [
        (Purpose.TOKEN, Scheme.W8A8),
        (Purpose.TOKEN, Scheme.W8A16),
        (Purpose.TOKEN, Scheme.W8A16_BLOCK),
        (Purpose.ROWS, Scheme.W8A16_BLOCK),
    ],
)
def test_blocks_of_bits_err_no_more_than_rounding_their_input_may(
    config: ModelConfig, tmp_path: Path, columns: int, purpose: Purpose, scheme: Scheme
) -> None:
    """MatMulNBits rounds its input to int8 block by block: it may be off by half a step times the weights."""
    config = msgspec.structs.replace(config, intermediate_size=columns)
    product = Product(config, DOWN, tmp_path, scheme)
    x = normal(1, 5, columns)
    found = product.run(x, purpose, 1.0)  # a fixed scale is not used for one token
    exact, bound = x @ product.int8.T, np.zeros(found.shape)
    block = 256 if scheme is not Scheme.W8A16_BLOCK and columns >= 256 else 128
    for start in range(0, columns, block):
        part = slice(start, start + block)
        step = np.abs(x[..., part]).max(-1, keepdims=True) / INT8_MAX
        bound += step / 2 * np.abs(product.int8[:, part]).sum(1)
    error = np.abs(found - exact)
    print("largest error:", error.max(), "of", bound.min())
    assert (error <= 1.01 * bound).all()
    assert error.max() > 1e-5  # it does round


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("scheme", Scheme)
def test_int8_sums_do_not_saturate(config: ModelConfig, tmp_path: Path, purpose: Purpose, scheme: Scheme) -> None:
    """Processors without VNNI add int8 products in 16 bits unless told not to: the largest ones would be cut off."""
    config = msgspec.structs.replace(config, intermediate_size=256)
    product = Product(config, DOWN, tmp_path, scheme)
    with torch.no_grad():
        product.linear.get_parameter("weight").fill_(1.0)[::2] = -1.0
    x = np.full((1, 3, 256), 1.0, np.float32)
    found = product.run(x, purpose, 1.0)
    assert np.abs(found - x @ product.weight.T).max() < 1e-3


@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("name", [DOWN, BIASED])
def test_float_product_is_exact(config: ModelConfig, tmp_path: Path, purpose: Purpose, name: str) -> None:
    product = Product(config, name, tmp_path, Scheme.FLOAT)
    x = normal(1, 5, product.weight.shape[1])
    found = product.run(x, purpose)
    assert np.abs(found - (x @ product.weight.T + product.bias)).max() < 1e-5


@pytest.mark.parametrize("purpose", Purpose)
def test_a_matrix_is_taken_as_it_is(config: ModelConfig, tmp_path: Path, purpose: Purpose) -> None:
    """The vision tower and the head have no batch axis."""
    product = Product(config, DOWN, tmp_path, Scheme.W8A8)
    x = normal(4, 96)
    found = product.run(x, purpose, 4.0)
    assert found.shape == (4, 48)
    assert np.abs(found - x @ product.weight.T).max() < 0.05 * np.abs(found).max()


@pytest.fixture
def model(config: ModelConfig) -> EchoVLM:
    """Five experts, two a token."""
    return init_model(config, seed=4, std=0.3).eval()


def experts_graph(model: EchoVLM, tokens: int) -> tuple[SparseMoE, ir.Model, dict[str, Floats], Floats]:
    """The mixture, its experts as one mark, their inputs, and what torch makes of them."""
    moe = model.get_submodule(EXPERTS.removesuffix(".experts"))
    assert isinstance(moe, SparseMoE)
    x = torch.from_numpy(normal(1, tokens, 48, seed=9))
    with torch.no_grad():
        weights = moe.route(moe.gate(x))
        hidden = moe.expert_hidden(x) * weights.unsqueeze(-1)
        down = torch.stack([expert.get_parameter("down_proj.weight") for expert in moe.experts])
        wanted = torch.einsum("bnei,ehi->bnh", hidden, down).numpy()
    inputs = {"x": x.numpy(), "weights": weights.numpy()}
    shapes = {f"{EXPERTS}.{key}": tuple(parameter.shape) for key, parameter in moe.experts.named_parameters()}
    return moe, mark("Experts", EXPERTS, inputs, shapes, 48), inputs, wanted


@pytest.mark.parametrize("purpose", Purpose)
def test_float_experts_equal_the_torch_mixture(
    config: ModelConfig, model: EchoVLM, tmp_path: Path, purpose: Purpose
) -> None:
    _, graph, inputs, wanted = experts_graph(model, 11)
    found = run(graph, model, plan_of(config, EXPERTS, Scheme.FLOAT), purpose, inputs, tmp_path)
    print("largest error:", np.abs(found - wanted).max())
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("purpose", [Purpose.PORTABLE, Purpose.ROWS])
def test_int8_experts_equal_their_oracle_and_stay_near_the_mixture(
    config: ModelConfig, model: EchoVLM, tmp_path: Path, purpose: Purpose
) -> None:
    moe, graph, inputs, wanted = experts_graph(model, 11)
    x = inputs["x"]
    with torch.no_grad():
        hidden = moe.expert_hidden(torch.from_numpy(x)).numpy()  # [1, n, experts, intermediate]
    maxima = {f"{EXPERTS}.{n}.down_proj": float(np.abs(hidden[..., n, :]).max()) for n in range(5)}
    plan = plan_of(config, EXPERTS, Scheme.W8A8, {EXPERTS: float(np.abs(x).max()), **maxima})
    found = run(graph, model, plan, purpose, inputs, tmp_path)
    seen = fake_quantized(x, plan.input_maximum[EXPERTS])
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
        oracle += inputs["weights"][..., n : n + 1] * (
            fake_quantized(between, maxima[f"{EXPERTS}.{n}.down_proj"]) @ down.T
        )
    # A hidden value between two levels may fall to either side in the last digit, so the bound is a few levels' worth.
    print("largest error:", np.abs(found - oracle).max(), "from float:", np.abs(found - wanted).max())
    assert np.linalg.norm(found - oracle) / np.linalg.norm(oracle) < 2e-3
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.05


@pytest.mark.parametrize("purpose", [Purpose.PORTABLE, Purpose.ROWS])
def test_an_expert_without_tokens_is_named(
    config: ModelConfig, model: EchoVLM, tmp_path: Path, purpose: Purpose
) -> None:
    _, graph, inputs, _ = experts_graph(model, 3)
    ranges = {EXPERTS: 1.0} | {f"{EXPERTS}.{n}.down_proj": 1.0 for n in (0, 1, 2, 4)}
    with pytest.raises(SonoEdgeError, match=r"no range for 'model\.layers\.0\.moe\.experts\.3\.down_proj'"):
        run(graph, model, plan_of(config, EXPERTS, Scheme.W8A8, ranges), purpose, inputs, tmp_path)


def test_the_marked_graph_stays_as_it_was(config: ModelConfig, model: EchoVLM, tmp_path: Path) -> None:
    """So one export serves every purpose and every plan."""
    _, graph, _, _ = experts_graph(model, 3)
    before, plan = str(graph), plan_of(config, EXPERTS, Scheme.W8A16)
    for purpose in Purpose:
        lowered(graph, config, plan, plan_layout(config, plan), tmp_path / "weights", purpose)
    assert str(graph) == before
