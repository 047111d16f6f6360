"""The graphs in ONNX Runtime: float ones repeat the recorded outputs, int8 ones hold the operators promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from safetensors.numpy import load_file

from sonoedge.bundle import BundleWriter
from sonoedge.calibration.table import CalibrationTable
from sonoedge.errors import SonoEdgeError
from sonoedge.export.bundle_graphs import WEIGHTS, stage_costs, write_graphs
from sonoedge.export.layout import EMBEDDING, plan_layout
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import empty_model
from sonoedge.export.passes.products import Purpose
from sonoedge.export.quantize import make_plan, product_names, products, quantized_share
from sonoedge.export.recipe import Quantization
from sonoedge.export.scheme import CacheScheme, QuantizationPlan, Scheme
from sonoedge.runtime.preprocess import Patches

BOUND = 1e-4
BOUND_IN_16_BIT = 2e-2  # attention of the graphs for TensorRT
PROBES = ("probe.hidden.", "probe.router.")
Floats = npt.NDArray[np.float32]


class Case(msgspec.Struct, frozen=True):
    """One recorded sequence without padding."""

    ids: npt.NDArray[np.int64]  # [s]
    positions: npt.NDArray[np.int64]  # [3, s]
    images: list[Patches]
    logits: Floats  # [s, vocab]


def recorded(folder: Path) -> dict[str, Case]:
    """Every recorded sequence, those of a padded batch one by one."""
    cases = {}
    for name in ("text", "image", "two_images", "batch_left_padded"):
        tensors = load_file(folder / f"{name}.safetensors")
        grids = [tuple(int(n) for n in row) for row in tensors.get("image_grid_thw", np.empty((0, 3)))]
        ends = np.cumsum([t * h * w for t, h, w in grids], dtype=int)
        pictures = iter(
            Patches(tensors["pixel_values"][end - t * h * w : end], (t, h, w))
            for (t, h, w), end in zip(grids, ends, strict=True)
        )
        for row, mask in enumerate(tensors["attention_mask"].astype(bool)):
            ids = tensors["input_ids"][row][mask]
            images = [next(pictures) for _ in range(int((ids == 508).sum()))]
            logits = tensors["logits"][row][mask]
            cases[f"{name}.{row}"] = Case(ids, tensors["position_ids"][:, row][:, mask], images, logits)
        assert next(pictures, None) is None
    return cases


@pytest.fixture(scope="module")
def cases(golden_folder: Path) -> dict[str, Case]:
    return recorded(golden_folder / "echovlm_tiny")


def plan_of(names: tuple[str, ...], scheme: Scheme, cache: CacheScheme = CacheScheme.FLOAT) -> QuantizationPlan:
    """Every product in `scheme`, with a range for whatever may ask for one."""
    schemes = dict.fromkeys(names, scheme) | {EMBEDDING: Scheme.FLOAT}
    inputs = [*names, *(f"{name}.{expert}.down_proj" for name in names for expert in range(4))]
    caches = [f"model.layers.{layer}.self_attn.{part}" for layer in range(3) for part in ("key", "value")]
    return QuantizationPlan(schemes, dict.fromkeys(inputs, 4.0), cache, dict.fromkeys(caches, 4.0))


@pytest.fixture(scope="module")
def names(marked: Any) -> tuple[str, ...]:
    return product_names(marked.config)


@pytest.fixture(scope="module")
def compiled(
    marked: Any,
    names: tuple[str, ...],
    tiny_checkpoint: Path,
    compile_graphs: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Scheme], Any]:
    """The smallest checkpoint's graphs with everything in one scheme, made once."""
    made: dict[Scheme, Any] = {}

    def get(scheme: Scheme) -> Any:
        if scheme not in made:
            graphs = {"vision": marked.vision(), "decoder": marked.decoder()}
            folder = tmp_path_factory.mktemp("graphs") / scheme.value
            made[scheme] = compile_graphs(tiny_checkpoint, graphs, plan_of(names, scheme), folder)
        return made[scheme]

    return get


@pytest.fixture(params=Purpose)
def session(request: pytest.FixtureRequest, compiled: Callable[[Scheme], Any]) -> Iterator[Any]:
    """The float graphs of every purpose."""
    opened = compiled(Scheme.FLOAT).open(request.param)
    yield opened
    opened.close()


@pytest.fixture
def bound(session: Any) -> float:
    """The largest error of a logit."""
    return BOUND_IN_16_BIT if type(session).__name__ == "BufferSession" else BOUND


def embeds_of(session: Any, case: Case) -> Floats | None:
    return np.concatenate([session.encode_image(image) for image in case.images]) if case.images else None


def test_recorded_sequences_are_what_they_should_be(cases: dict[str, Case]) -> None:
    assert len(cases) > 4
    assert {len(case.images) for case in cases.values()} >= {0, 1, 2}


def test_float_graphs_repeat_the_recording_in_one_pass(session: Any, bound: float, cases: dict[str, Case]) -> None:
    for name, case in cases.items():
        session.rewind(0)
        rows = np.arange(len(case.ids))
        found = session.extend(case.ids, case.positions, image_embeds=embeds_of(session, case), logits_rows=rows)
        error = np.abs(found - case.logits).max()
        print(name, "largest error:", error)
        assert error < bound


def test_float_graphs_repeat_the_recording_token_by_token(session: Any, bound: float, cases: dict[str, Case]) -> None:
    for case in cases.values():
        session.rewind(0)
        embeds = embeds_of(session, case)
        first = 1 + max(np.flatnonzero(case.ids == 511), default=0)  # images go in whole
        found = [session.extend(case.ids[:first], case.positions[:, :first], image_embeds=embeds)]
        found += [
            session.extend(case.ids[n : n + 1], case.positions[:, n : n + 1]) for n in range(first, len(case.ids))
        ]
        assert session.length == len(case.ids)
        assert np.abs(np.concatenate(found) - case.logits[first - 1 :]).max() < bound


def test_two_float_graphs_take_turns_at_one_cache(compiled: Callable[[Scheme], Any], cases: dict[str, Case]) -> None:
    """Several tokens by one graph, one by the other, the cache rewound between them: always what was recorded."""
    session = compiled(Scheme.FLOAT).open(Purpose.ROWS, both=True)
    for case in cases.values():
        session.rewind(0)
        ids, positions, total = case.ids, case.positions, len(case.ids)
        first = 1 + max(np.flatnonzero(ids == 511), default=0)
        session.extend(ids[:first], positions[:, :first], image_embeds=embeds_of(session, case))
        for start, end in (
            (first, first + 1),
            (first + 1, total),
            (total - 1, total),
            (first, total - 1),
            (total - 1, total),
        ):
            session.rewind(start)
            found = session.extend(ids[start:end], positions[:, start:end], logits_rows=np.arange(end - start))
            assert np.abs(found - case.logits[start:end]).max() < BOUND
    session.close()


def test_branches_of_a_tree_and_rewinding_repeat_the_recording(
    session: Any, bound: float, cases: dict[str, Case]
) -> None:
    """The recorded ending stands behind its prefix beside a strange branch, as hints do, and again after a rewind."""
    case = cases["two_images.0"]
    total = len(case.ids)
    length = 1 + int(np.flatnonzero(case.ids == 511)[-1])
    ending = total - length
    assert ending > 2
    session.extend(case.ids[:length], case.positions[:, :length], image_embeds=embeds_of(session, case))
    strange = np.full(5, 77, np.int64)
    ids = np.concatenate([strange, case.ids[length:]])
    positions = np.concatenate(
        [case.positions[:, length : length + 1].repeat(5, axis=1), case.positions[:, length:]], axis=1
    )
    visible = np.zeros((5 + ending, length + 5 + ending), bool)
    visible[:, :length] = True
    visible[:5, length : length + 5] = np.tri(5, dtype=bool)
    visible[5:, length + 5 :] = np.tri(ending, dtype=bool)
    for _ in range(2):
        rows = np.arange(5, 5 + ending)
        found = session.extend(ids, positions, visible=visible, logits_rows=rows)
        assert np.abs(found - case.logits[length:]).max() < bound
        session.rewind(length)
    found = session.extend(case.ids[length:], case.positions[:, length:], logits_rows=np.arange(ending))
    assert np.abs(found - case.logits[length:]).max() < bound


def test_marks_are_called_as_the_recipe_calls_products(marked: Any, tiny_model: EchoVLM) -> None:
    linears, mixtures = products(tiny_model)
    nodes = [node for graph in (marked.vision(), marked.decoder()) for node in graph.graph if node.domain == DOMAIN]
    names: dict[str, list[str]] = {}
    for node in nodes:
        names.setdefault(node.op_type, []).append(node.attributes["name"].as_string())
    assert all(len(found) == len(set(found)) for found in names.values())
    assert set(names.pop("Linear")) == {*linears, "lm_head"}
    assert set(names.pop("Experts")) == set(mixtures)
    assert names.pop("Embedding") == [EMBEDDING]
    assert names.pop("Attention") == [f"model.layers.{layer}.self_attn" for layer in range(3)]
    norms = [f"model.layers.{layer}.{part}_layernorm" for layer in range(3) for part in ("input", "post_attention")]
    assert sorted(names.pop("RMSNorm")) == [*norms, "model.norm"]
    assert sorted(names.pop("Probe")) == sorted(f"{probe}{layer}" for probe in PROBES for layer in range(3))
    assert not names


def test_an_export_holds_no_weight(marked: Any) -> None:
    """Parameters leave under the checkpoint's keys and without a value: the file is what counts, not the model."""
    state = set(empty_model(marked.config).state_dict())
    found: set[str] = set()
    for graph in (marked.vision(), marked.decoder()):
        hollow = {name for name, value in graph.graph.initializers.items() if value.const_value is None}
        held = [value for name, value in graph.graph.initializers.items() if name not in hollow]
        assert sum(value.const_value.size for value in held) < 100
        found |= hollow
    assert found == state


def loaded(compiled: Any, name: str, purpose: Purpose) -> onnx.ModelProto:
    return onnx.load(compiled.path(name, purpose), load_external_data=False)


def nodes_of(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Those of the graph and of its functions."""
    return [*model.graph.node, *(node for function in model.functions for node in function.node)]


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W8A8_DYNAMIC, Scheme.W8A16])
def test_decode_reads_bits_and_chosen_experts_only(
    compiled: Callable[[Scheme], Any], names: tuple[str, ...], scheme: Scheme
) -> None:
    model = loaded(compiled(scheme), "decoder", Purpose.TOKEN)
    nodes = nodes_of(model)
    by_type: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        by_type.setdefault(node.op_type, []).append(node)
    bits, mixtures = by_type["MatMulNBits"], by_type["QMoE"]
    assert len(bits) == sum(not name.startswith("visual.") and not name.endswith(".experts") for name in names)
    assert len(mixtures) == 3
    for node in bits:
        attributes = attributes_of(node)
        assert (attributes["bits"], attributes["accuracy_level"]) == (8, 4)
        assert attributes["block_size"] >= 128
        assert node.domain == "com.microsoft"
    makers = {output: node for node in nodes for output in node.output}
    for node in mixtures:
        attributes = attributes_of(node)
        assert attributes["expert_weight_bits"] == 8
        assert attributes["normalize_routing_weights"] == 0
        assert attributes["k"] == 2
        assert len(node.input) == 15
        assert node.input[14] == node.input[1]  # the weights of those chosen, zeros for the others
        assert makers[node.input[14]].op_type == "Reshape"
    # A token's input is rounded nowhere else.
    assert not {"QuantizeLinear", "DequantizeLinear", "QGemm", "MatMulInteger"} & by_type.keys()
    assert len(by_type["GroupQueryAttention"]) == 3


@pytest.mark.parametrize("name", ["vision", "decoder"])
@pytest.mark.parametrize("purpose", [Purpose.ROWS, Purpose.PORTABLE])
def test_many_rows_are_symmetric_int8_between_q_and_dq(
    compiled: Callable[[Scheme], Any], names: tuple[str, ...], name: str, purpose: Purpose
) -> None:
    graphs = compiled(Scheme.W8A8)
    model = loaded(graphs, name, purpose)
    counted: Counter[str] = Counter()
    scopes: list[Any] = [model.graph, *model.functions]
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for scope in scopes:
        constants = {node.output[0]: node.attribute[0].t for node in scope.node if node.op_type == "Constant"}
        for node in scope.node:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            zero = constants.get(node.input[2], values.get(node.input[2]))
            if zero is None:  # what a function is given: looked at where it is called
                assert node.input[2].endswith("_zero")
                assert scope is not model.graph
                continue
            counted[node.op_type] += 1
            assert zero.data_type == onnx.TensorProto.INT8
            assert not np.any(onnx.numpy_helper.to_array(zero))
    for key, tensor in values.items():
        if key.endswith("_zero"):
            counted["zeros"] += 1
            assert tensor.data_type == onnx.TensorProto.INT8
            assert not np.any(onnx.numpy_helper.to_array(tensor))
            assert values[key.removesuffix("_zero")].data_type == onnx.TensorProto.INT8
    mine = [each for each in names if each.startswith("visual.") == (name == "vision")]
    mixtures = [each for each in mine if each.endswith(".experts")]
    thirds = sum(each.endswith("attn.qkv") for each in mine) if purpose is Purpose.PORTABLE else 0
    # Four experts, two matrices each; TensorRT gets queries, keys and values as three products.
    assert counted["zeros"] == len(mine) - len(mixtures) + 8 * len(mixtures) + 2 * thirds
    assert counted["DequantizeLinear"] > 0
    assert not any(node.op_type == "MatMulNBits" for node in nodes_of(model))
    float_matrices = [key for key, t in values.items() if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]
    assert not any(key.startswith(tuple(mine)) for key in float_matrices), float_matrices
    domains = {node.domain for node in nodes_of(model)} - {"", DOMAIN}
    assert domains == ({"com.microsoft"} if purpose is Purpose.ROWS and name == "decoder" else set())
    if purpose is Purpose.PORTABLE:
        onnx.checker.check_model(str(graphs.path(name, purpose)))


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_onnx_runtime_computes_every_int8_product_in_int8(
    compiled: Callable[[Scheme], Any], names: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    """A pair of Q and DQ that the runtime cannot fuse would be computed in float, slower than float itself."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # as sessions do
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    path = compiled(Scheme.W8A8).path(name, Purpose.ROWS)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    counted = Counter(
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    )
    mine = [each for each in names if each.startswith("visual.") == (name == "vision")]
    mixtures = [each for each in mine if each.endswith(".experts")]
    assert counted["QGemm"] == len(mine) - len(mixtures) + 8 * len(mixtures)
    assert counted["Gemm"] == counted["DequantizeLinear"] == 0


@pytest.mark.parametrize("scheme", Scheme)
def test_all_graphs_name_one_file_that_holds_everything_once(
    compiled: Callable[[Scheme], Any], names: tuple[str, ...], marked: Any, scheme: Scheme
) -> None:
    graphs = compiled(scheme)
    layout = plan_layout(marked.config, plan_of(names, scheme))
    used: set[tuple[int, int]] = set()
    for path in sorted(graphs.folder.glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        small = 0
        for tensor in model.graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if not entries:
                small += len(tensor.raw_data)
                continue
            assert entries["location"] == "model.weights"
            name, _, part = tensor.name.removesuffix("_bits").removesuffix("_words").partition("_part")
            stored, parts = layout.tensors[name], 1
            offset, length = int(entries["offset"]), int(entries["length"])
            if part:
                assert ".attn.qkv." in name
                index, parts = (int(n) for n in part.split("of"))
                offset -= index * length
                assert 0 <= index < parts == 3
            assert (offset, length * parts) == (stored.offset, stored.length)
            if tensor.name.endswith("_words"):
                assert tuple(tensor.dims) == (stored.shape[0], stored.shape[1] // 4)
            else:
                assert tuple(tensor.dims) == (stored.shape[0] // parts, *stored.shape[1:])
            used.add((stored.offset, stored.offset + stored.length))
        assert small < 20_000, "a second copy of weights"
    assert (graphs.folder / "model.weights").stat().st_size == layout.size
    # Every written tensor is read by a graph, as it is or as part of the tensor of all experts.
    for unit in layout.units:
        for part in unit.parts:
            end = part.offset + part.length
            assert any(start <= part.offset and end <= stop for start, stop in used), part.name


def test_probes_can_be_asked_for(compiled: Callable[[Scheme], Any]) -> None:
    for purpose in Purpose:
        made = {
            output for node in loaded(compiled(Scheme.W8A8), "decoder", purpose).graph.node for output in node.output
        }
        assert {f"{probe}{layer}" for probe in PROBES for layer in range(3)} <= made


@pytest.mark.parametrize("two_forms", [True, False])
def test_the_recipe_says_how_many_forms_a_bundle_has(
    marked: Any, names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, two_forms: bool
) -> None:
    """One form only: the graph for many tokens serves one as well, and no MatMulNBits takes memory of its own."""
    marked.stand_in(monkeypatch)
    plan = plan_of(names, Scheme.W8A16)
    with BundleWriter(tmp_path / "bundle") as writer:
        listed = write_graphs(
            marked.config,
            plan,
            plan_layout(marked.config, plan),
            marked.context,
            writer,
            two_forms=two_forms,
            block_rows=64,
        )
        paths = [writer.add(graph.path) for graph in listed]
        kinds = [(graph.purpose, graph.formulation) for graph in listed]
        assert kinds == [
            ("vision", "ort"),
            ("vision", "qdq"),
            ("decoder", "ort"),
            ("decoder", "qdq"),
            ("vision", "trt"),
            ("decoder", "trt"),
            # Kernels for many tokens want int8 activations, which this plan has none of.
            *([("decode", "ort"), ("decode", "trt-plugins")] if two_forms else []),
        ]
        operators = [{node.op_type for node in nodes_of(onnx.load(path, load_external_data=False))} for path in paths]
        assert any("MatMulNBits" in found for found in operators) == two_forms
        assert WEIGHTS.startswith("graphs/")


def test_a_decode_step_reads_half_of_the_experts(marked: Any, names: tuple[str, ...]) -> None:
    layout = plan_layout(marked.config, plan_of(names, Scheme.W8A16))
    costs = stage_costs(marked.config, layout)
    lengths = {unit.values.name: sum(part.length for part in unit.parts) for unit in layout.units}
    experts = sum(length for name, length in lengths.items() if ".experts." in name)
    vision = sum(length for name, length in lengths.items() if name.startswith("visual."))
    embeddings = lengths[f"{EMBEDDING}.weight"]
    assert costs["vision"].bytes == vision
    assert costs["decoder"].bytes == sum(lengths.values()) - vision - embeddings
    assert costs["decode"].bytes == sum(lengths.values()) - vision - embeddings - experts // 2


def test_a_plan_names_every_product(marked: Any) -> None:
    settings = Quantization(Scheme.W8A8, schemes={"model.layers.1.mlp": Scheme.FLOAT})
    chosen = make_plan(marked.config, CalibrationTable.empty(), settings)
    floats = {name for name, scheme in chosen.schemes.items() if scheme is Scheme.FLOAT}
    assert floats == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert {name for name in chosen.schemes if name.endswith("experts")} == {
        f"model.layers.{n}.moe.experts" for n in range(3)
    }
    assert not any("gate.weight" in name or name.endswith(("moe.gate", "coefficient")) for name in chosen.schemes)
    assert chosen.schemes[EMBEDDING] is Scheme.W8A16  # looked up, not multiplied: its scheme has no activation
    assert quantized_share(chosen) == pytest.approx(1 - 3 / len(product_names(marked.config)))


def test_schemes_may_differ_between_experts(
    tiny: Any, marked: Any, cases: dict[str, Case], compile_graphs: Callable[..., Any], tmp_path: Path
) -> None:
    """Two sorts of experts in one graph each keep their own meaning."""
    table = msgspec.json.decode((tiny.bundle / "calibration.json").read_bytes(), type=CalibrationTable)
    parts = ("model.layers.0.moe", "model.layers.2.moe", "visual", EMBEDDING)
    settings = {
        "mixed": Quantization(Scheme.W8A8, schemes=dict.fromkeys(parts, Scheme.FLOAT)),
        "int8": Quantization(Scheme.W8A8),
    }
    case, errors = cases["image.0"], {}
    for label, setting in settings.items():
        chosen = make_plan(marked.config, table, setting)
        assert (quantized_share(chosen) < 1) == (label == "mixed")
        graphs = {"vision": marked.vision(), "decoder": marked.decoder()}
        session = compile_graphs(tiny.checkpoint, graphs, chosen, tmp_path / label).open(Purpose.ROWS)
        embeds = embeds_of(session, case)
        found = session.extend(case.ids, case.positions, image_embeds=embeds, logits_rows=np.arange(len(case.ids)))
        errors[label] = float(np.linalg.norm(found - case.logits) / np.linalg.norm(case.logits))
        session.close()
    print("relative errors:", errors)
    assert 1e-4 < errors["mixed"] < errors["int8"] < 0.25


@pytest.mark.parametrize("prefix", ["vision", "visual.blocks.9", "model.layers.0.moe.gate", "model.embed_tokens.x"])
def test_a_scheme_for_what_is_no_product_is_refused(marked: Any, prefix: str) -> None:
    words = rf"quantization.schemes names '{prefix}', with which no product begins: write names such as 'visual.patch"
    with pytest.raises(SonoEdgeError, match=words):
        make_plan(marked.config, CalibrationTable.empty(), Quantization(Scheme.W8A16, schemes={prefix: Scheme.FLOAT}))
