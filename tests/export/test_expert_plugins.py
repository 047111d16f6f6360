"""Experts as plugins: nodes of graphs, computed by the kernels' oracle, give what the function of operators gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.export.bundle_graphs import plugin_graphs
from sonoedge.export.graphs import OPSET
from sonoedge.export.layout import plan_layout
from sonoedge.export.lowering import lowered
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.config import ModelConfig, MoEConfig
from sonoedge.export.models.loading import init_model, open_checkpoint, save_checkpoint
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.passes.expert_plugins import Dispatch
from sonoedge.export.passes.lower_products import has_kernels
from sonoedge.export.passes.products import Purpose
from sonoedge.export.plugins import oracle
from sonoedge.export.plugins.dispatch import KERNELS, Experts
from sonoedge.export.quantize import product_names
from sonoedge.export.scheme import QuantizationPlan, Scheme
from sonoedge.export.weight_file import write_weights
from sonoedge.runtime.sessions.ort import load_graph

Floats = npt.NDArray[np.float32]
EXPERTS = "model.layers.0.moe.experts"
FLOAT = ir.TensorType(ir.DataType.FLOAT)
EXPERT_SIZES = tuple(Experts.__struct_fields__)


def _operator(name: str) -> type[OpRun]:
    """An operator of the project's domain for the reference evaluator."""

    def run(self: OpRun, *inputs: Any, **attributes: Any) -> tuple[npt.NDArray[Any], ...]:
        experts = Experts(**{key: attributes[key] for key in EXPERT_SIZES})
        return oracle.compute(name, inputs, experts, "float32")

    return type(name, (OpRun,), {"op_domain": DOMAIN, "_run": run})


OPERATORS = [_operator(name) for name in KERNELS]


class Mixture:
    """One mixture of a random model with its input, and its graphs by dispatch."""

    def __init__(self, config: ModelConfig, folder: Path, scheme: Scheme) -> None:
        self.config, self.folder, self.scheme = config, folder, scheme
        model = init_model(config, seed=4, std=0.3).eval()
        save_checkpoint(model, folder / "checkpoint")
        moe = model.get_submodule(EXPERTS.removesuffix(".experts"))
        assert isinstance(moe, SparseMoE)
        x = torch.randn(1, 21, config.hidden_size, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            logits = moe.gate(x)
            hidden = moe.expert_hidden(x)
            self.inputs = {"x": x.numpy(), "logits": logits.numpy(), "weights": moe.route(logits).numpy()}
        assert config.moe is not None
        maxima = {f"{EXPERTS}.{n}.down_proj": float(hidden[..., n, :].abs().max()) for n in range(hidden.shape[-2])}
        schemes = dict.fromkeys(product_names(config), Scheme.FLOAT) | {EXPERTS: scheme}
        self.plan = QuantizationPlan(schemes, {EXPERTS: float(x.abs().max()), **maxima})

    def marked(self) -> ir.Model:
        """Experts over x [1, n, hidden], with router logits that a probe names and the weights that follow."""
        moe = self.config.moe
        assert moe is not None
        width, inner = self.config.hidden_size, moe.moe_intermediate_size
        values = [
            ir.Value(name=name, shape=ir.Shape([1, "n", array.shape[-1]]), type=FLOAT)
            for name, array in self.inputs.items()
        ]
        held = [
            ir.Value(
                name=f"{EXPERTS}.{n}.{part}.weight",
                shape=ir.Shape([width, inner] if part == "down_proj" else [inner, width]),
                type=FLOAT,
            )
            for n in range(moe.num_experts)
            for part in ("gate_proj", "up_proj", "down_proj")
        ]
        seen = ir.node("Identity", [values[1]])
        seen.outputs[0].name = "logits_seen"
        probe = ir.node("Probe", seen.outputs, attributes={"name": "probe.router.0"}, domain=DOMAIN)
        node = ir.node("Experts", [values[0], values[2], *held], attributes={"name": EXPERTS}, domain=DOMAIN)
        node.outputs[0].name, node.outputs[0].type = "y", FLOAT
        node.outputs[0].shape = ir.Shape([1, "n", width])
        opsets = {"": OPSET, DOMAIN: 1}
        nodes = [seen, probe, node]
        return ir.Model(
            ir.Graph(values, node.outputs, nodes=nodes, initializers=held, opset_imports=opsets, name="m"),
            ir_version=10,
        )

    def graph(self, purpose: Purpose, dispatch: Dispatch, block_rows: int = 16) -> Path:
        """Lowered and written beside its weights."""
        config, headers = open_checkpoint(self.folder / "checkpoint")
        layout = plan_layout(config, self.plan)
        work = self.folder / f"{purpose.value}-{dispatch.value}-{block_rows}"
        work.mkdir()
        write_weights(work / "w", layout, headers, Smoothing.none(), identity="")
        model = lowered(self.marked(), config, self.plan, layout, work / "w", purpose, dispatch, block_rows)
        ir.save(model, work / "mixture.onnx")
        return work / "mixture.onnx"

    def by_function(self) -> Floats:
        """What the function of standard operators gives on ONNX Runtime, in float32."""
        session: Any = load_graph(self.graph(Purpose.PORTABLE, Dispatch.FUNCTION), 1)
        return np.asarray(session.run(None, self.inputs)[0])

    def by_plugins(self, path: Path, step: int) -> Floats:
        """What the graph's plugins give, `step` tokens at a time, each computed by the oracle."""
        evaluator = ReferenceEvaluator(onnx.load(path), new_ops=OPERATORS)
        tokens = self.inputs["x"].shape[1]
        given = ({name: array[:, n : n + step] for name, array in self.inputs.items()} for n in range(0, tokens, step))
        results: list[Any] = [evaluator.run(None, feed) for feed in given]
        return np.concatenate([np.asarray(result[0]) for result in results], axis=1)


@pytest.fixture(params=[False, True], ids=["shares as they are", "shares of the chosen"])
def config(small_config: ModelConfig, request: pytest.FixtureRequest) -> ModelConfig:
    """Five experts of 32, two a token."""
    vision = msgspec.structs.replace(small_config.vision, depth=1, in_channels=1)
    moe = MoEConfig(2, 32, 16, num_experts=5, norm_topk_prob=request.param)
    return msgspec.structs.replace(small_config, num_hidden_layers=1, vision=vision, moe=moe)


@pytest.mark.parametrize("block_rows", [16, 64])
def test_grouped_plugins_mix_as_the_function_does(config: ModelConfig, tmp_path: Path, block_rows: int) -> None:
    mixture = Mixture(config, tmp_path, Scheme.W8A8)
    path = mixture.graph(Purpose.TENSORRT, Dispatch.GROUPED, block_rows)
    found, wanted = mixture.by_plugins(path, 21), mixture.by_function()
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    print("error:", error)
    assert error < 2e-3  # a hidden value between two levels may fall to either side


@pytest.mark.parametrize("step", [1, 4])
def test_chosen_plugins_mix_as_the_function_does(config: ModelConfig, tmp_path: Path, step: int) -> None:
    mixture = Mixture(config, tmp_path, Scheme.W8A16)
    path = mixture.graph(Purpose.TENSORRT, Dispatch.CHOSEN)
    found, wanted = mixture.by_plugins(path, step), mixture.by_function()
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("dispatch", [Dispatch.GROUPED, Dispatch.CHOSEN])
def test_nodes_carry_what_tensorrt_and_the_kernels_ask_for(
    config: ModelConfig, tmp_path: Path, dispatch: Dispatch
) -> None:
    model = onnx.load(Mixture(config, tmp_path, Scheme.W8A8).graph(Purpose.TENSORRT, dispatch, 32))
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    operators = {
        Dispatch.GROUPED: ["ExpertRoute", "ExpertUp", "ExpertDown", "ExpertSum"],
        Dispatch.CHOSEN: ["ExpertUpDecode", "ExpertDownDecode"],
    }
    assert [node.op_type for node in nodes] == operators[dispatch]
    for node in nodes:
        kernel = KERNELS[node.op_type]
        assert (len(node.input), len(node.output)) == (len(kernel.inputs), len(kernel.outputs))
        found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert found.pop("plugin_namespace") == DOMAIN.encode()
        assert (found.pop("plugin_version"), found.pop("aot")) == (b"1", 1)
        assert config.moe is not None
        normalised = int(config.moe.norm_topk_prob)
        assert found == dict(zip(EXPERT_SIZES, (5, 2, config.hidden_size, 32, normalised, 32), strict=True))
    # Experts that route by themselves leave the routing weights to nobody.
    assert "weights" not in {name for node in model.graph.node for name in node.input}
    assert not model.functions


def test_kernels_are_for_schemes_and_widths_that_they_can_compute(config: ModelConfig) -> None:
    assert {scheme for scheme in Scheme if has_kernels(Dispatch.GROUPED, scheme, config)} == {Scheme.W8A8}
    chosen = {scheme for scheme in Scheme if has_kernels(Dispatch.CHOSEN, scheme, config)}
    assert chosen == {Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W8A16}
    assert not any(has_kernels(Dispatch.FUNCTION, scheme, config) for scheme in Scheme)
    assert config.moe is not None
    narrow = msgspec.structs.replace(config, moe=msgspec.structs.replace(config.moe, moe_intermediate_size=24))
    dense = msgspec.structs.replace(config, moe=None)
    for other in (narrow, dense):
        assert not any(has_kernels(dispatch, scheme, other) for dispatch in Dispatch for scheme in Scheme)


@pytest.mark.parametrize("two_forms", [True, False])
def test_a_bundle_has_the_plugin_graphs_that_its_schemes_allow(config: ModelConfig, two_forms: bool) -> None:
    def graphs(scheme: Scheme) -> list[str]:
        plan = QuantizationPlan({EXPERTS: scheme}, {})
        return [wanted.graph.purpose for wanted in plugin_graphs(config, plan, two_forms=two_forms)]

    assert graphs(Scheme.W8A8) == ["decoder", "decode"][: 1 + two_forms]
    assert graphs(Scheme.W8A16) == ["decode"] * two_forms
    assert graphs(Scheme.FLOAT) == []
