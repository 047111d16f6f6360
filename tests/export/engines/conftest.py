"""Small graphs written by hand, with the inputs that a bundle's have, and the library that builds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sonoedge.bundle import Bundle, BundleWriter, Contents, ExpertsSpec, Graph, open_bundle
from sonoedge.device_profiles import load_profile
from sonoedge.export.engines.builder import Target
from sonoedge.export.engines.device import Device, device_of
from sonoedge.export.engines.library import Library

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, PATCH = 32, 2, 1, 16, 64, 1176
CONTEXT = 96


@pytest.fixture(scope="session")
def tensorrt_rtx() -> ModuleType:
    """The builder that needs no GPU; there are wheels for x86-64 only."""
    module = pytest.importorskip("tensorrt_rtx", reason="waits for tensorrt-rtx, which has wheels for x86-64 only")
    assert isinstance(module, ModuleType)
    return module


@pytest.fixture(scope="session")
def device() -> Device:
    """A workstation that TensorRT-RTX builds for."""
    return device_of(load_profile("rtx-sm86"))


@pytest.fixture(scope="session")
def target(tensorrt_rtx: ModuleType, device: Device) -> Target:
    """Build with TensorRT-RTX for that workstation."""
    version: str = tensorrt_rtx.__version__
    return Target(Library("tensorrt_rtx", version, device.software[0], tensorrt_rtx), device.sm)


def value(name: str, dtype: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    """An input or output of a graph."""
    return helper.make_tensor_value_info(name, dtype, shape)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, np.ndarray],
) -> Path:
    """Write a graph whose larger constants are in a file beside it, as a bundle's are."""
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.weights", size_threshold=256)
    return path


def int8_product(
    name: str, x: str, out: str, wide: int, deep: int, constants: dict[str, np.ndarray]
) -> list[onnx.NodeProto]:
    """out [n, wide] = x [n, deep] times int8 weights, x quantized too."""
    rng = np.random.default_rng(len(constants))
    constants[f"{name}.weight"] = rng.integers(-127, 128, (wide, deep), dtype=np.int8)
    constants[f"{name}.scale"] = np.full(wide, 0.01, np.float32)
    constants[f"{name}.step"] = np.array(0.05, np.float32)
    return [
        helper.make_node(
            "QuantizeLinear", [x, f"{name}.step"], [f"{name}.q"], f"{name}/q", output_dtype=TensorProto.INT8
        ),
        helper.make_node("DequantizeLinear", [f"{name}.q", f"{name}.step"], [f"{name}.x"], f"{name}/dq"),
        helper.make_node("DequantizeLinear", [f"{name}.weight", f"{name}.scale"], [f"{name}.w"], f"{name}/w", axis=0),
        helper.make_node("Gemm", [f"{name}.x", f"{name}.w"], [out], name, transB=1),
    ]


def write_three(path: Path) -> Path:
    """x [n, 128] through a product in int8, one with int8 weights and one in float, to y [n, 64]."""
    rng = np.random.default_rng(1)
    constants: dict[str, np.ndarray] = {
        "b.weight": rng.integers(-127, 128, (96, 256), dtype=np.int8),
        "b.scale": np.full(96, 0.01, np.float32),
        "c.weight": rng.normal(size=(64, 96)).astype(np.float32),
    }
    nodes = [
        *int8_product("a", "x", "a.out", 256, 128, constants),
        helper.make_node("Relu", ["a.out"], ["a.relu"], "a.relu"),
        helper.make_node("DequantizeLinear", ["b.weight", "b.scale"], ["b.w"], "b/w", axis=0),
        helper.make_node("Gemm", ["a.relu", "b.w"], ["b.out"], "b", transB=1),
        helper.make_node("Relu", ["b.out"], ["b.relu"], "b.relu"),
        helper.make_node("Gemm", ["b.relu", "c.weight"], ["y"], "c", transB=1),
    ]
    inputs = [value("x", TensorProto.FLOAT, ["n", 128])]
    return save(path, nodes, inputs, [value("y", TensorProto.FLOAT, ["n", 64])], constants)


@pytest.fixture(scope="session")
def three_products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of three products, `a` in int8, `b` with int8 weights and `c` in float: x [n, 128] to y [n, 64]."""
    return write_three(tmp_path_factory.mktemp("graph") / "three.onnx")


def write_vision(path: Path) -> Path:
    """patches and places to image_embeds, four patches a row."""
    constants = {"four": np.array([-1, 4, HIDDEN], np.int64), "axis": np.array([1], np.int64)}
    constants["two"] = np.array([-1, 4, 2], np.int64)
    nodes = int8_product("proj", "patches", "flat", HIDDEN, PATCH, constants)
    nodes += [
        helper.make_node("Reshape", ["flat", "four"], ["blocks"], "blocks"),
        helper.make_node("ReduceMean", ["blocks", "axis"], ["mean"], "mean", keepdims=0),
        helper.make_node("Cast", ["places"], ["at"], "at", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["at", "two"], ["at_blocks"], "at_blocks"),
        helper.make_node("ReduceMean", ["at_blocks"], ["at_mean"], "at_mean", keepdims=1),
        helper.make_node("Reshape", ["at_mean", "one"], ["at_one"], "at_one"),
        helper.make_node("Add", ["mean", "at_one"], ["image_embeds"], "add"),
    ]
    constants["one"] = np.array([1, 1], np.int64)
    inputs = [value("patches", TensorProto.FLOAT, ["n", PATCH]), value("places", TensorProto.INT64, ["n", 2])]
    return save(path, nodes, inputs, [value("image_embeds", TensorProto.FLOAT, ["m", HIDDEN])], constants)


def write_decoder(path: Path, context: int = CONTEXT, *, in_place: bool = True) -> Path:
    """A decoder of one layer that reads every input; its cache is written in place, or comes out grown."""
    half = TensorProto.FLOAT16 if in_place else TensorProto.FLOAT
    constants: dict[str, np.ndarray] = {
        "words": np.random.default_rng(0).normal(size=(VOCAB, HIDDEN)).astype(np.float32),
        "flat": np.array([-1, HIDDEN], np.int64),
        "split": np.array([1, -1, HEADS, HEAD_DIM], np.int64),
        "split_kv": np.array([1, -1, KV_HEADS, HEAD_DIM], np.int64),
        "zero": np.array([0], np.int64),
        "two": np.array([2], np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["embedded"], "embed"),
        helper.make_node("Reshape", ["embedded", "flat"], ["x0"], "x0"),
        helper.make_node("Cast", ["positions"], ["turns"], "turns", to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["turns"], ["turn"], "turn", keepdims=0),
        helper.make_node("ReduceMean", ["image_embeds"], ["picture"], "picture", keepdims=0),
        helper.make_node("Add", ["x0", "turn"], ["x1"], "x1"),
        helper.make_node("Add", ["x1", "picture"], ["x"], "x"),
        *int8_product("q_proj", "x", "q0", HIDDEN, HIDDEN, constants),
        *int8_product("k_proj", "x", "k0", KV_HEADS * HEAD_DIM, HIDDEN, constants),
        *int8_product("v_proj", "x", "v0", KV_HEADS * HEAD_DIM, HIDDEN, constants),
    ]
    for name, shape in (("q", "split"), ("k", "split_kv"), ("v", "split_kv")):
        nodes += [
            helper.make_node("Reshape", [f"{name}0", shape], [f"{name}1"], f"{name}1"),
            helper.make_node("Transpose", [f"{name}1"], [f"{name}2"], f"{name}2", perm=[0, 2, 1, 3]),
            helper.make_node("Cast", [f"{name}2"], [name], name, to=half),
        ]
    for name, part in (("k", "key"), ("v", "value")):
        past, present = f"past_{part}_0", f"present_{part}_0"
        if in_place:
            nodes += [
                helper.make_node("TensorScatter", [past, name, "write_at"], [present], f"{part}.update", axis=2),
                helper.make_node("Shape", ["attention_bias"], [f"{part}.seen"], f"{part}.seen", start=3, end=4),
                helper.make_node("Slice", [present, "zero", f"{part}.seen", "two"], [part], f"{part}.read"),
            ]
        else:
            nodes += [
                helper.make_node("Concat", [past, name], [present], f"{part}.grow", axis=2),
                helper.make_node("Identity", [present], [part], f"{part}.read"),
            ]
    nodes += [
        helper.make_node("Attention", ["q", "key", "value", "attention_bias"], ["mixed"], "attention"),
        helper.make_node("Transpose", ["mixed"], ["turned"], "turned", perm=[0, 2, 1, 3]),
        helper.make_node("Cast", ["turned"], ["float"], "float", to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["float", "flat"], ["rows"], "rows"),
        helper.make_node("Gather", ["rows", "logits_rows"], ["picked"], "picked"),
        *int8_product("lm_head", "picked", "logits", VOCAB, HIDDEN, constants),
    ]
    tokens: int | str = context if in_place else "past"
    cache: list[int | str] = [1, KV_HEADS, tokens, HEAD_DIM]
    inputs = [
        value("input_ids", TensorProto.INT64, [1, "s"]),
        value("positions", TensorProto.INT64, [3, 1, "s"]),
        value("image_embeds", TensorProto.FLOAT, ["m", HIDDEN]),
        value("attention_bias", half, [1, 1, "s", "t"]),
        value("logits_rows", TensorProto.INT64, ["r"]),
        value("past_key_0", half, cache),
        value("past_value_0", half, cache),
        *([value("write_at", TensorProto.INT64, [1])] if in_place else []),
    ]
    outputs = [value("logits", TensorProto.FLOAT, ["r", VOCAB])]
    outputs += [value(f"present_{part}_0", half, [1, KV_HEADS, "c", HEAD_DIM]) for part in ("key", "value")]
    return save(path, nodes, inputs, outputs, constants)


@pytest.fixture
def make_bundle(contents: Contents, tmp_path: Path) -> Callable[..., Bundle]:
    """Write a bundle of the small graphs: `make_bundle(experts=None, context=50)` changes what its manifest says."""

    def make(*, formulations: tuple[str, ...] = ("trt", "qdq"), context: int = CONTEXT, **changes: object) -> Bundle:
        with BundleWriter(tmp_path / "made") as writer:
            graphs = []
            for formulation in formulations:
                write_vision(writer.add(f"graphs/vision.{formulation}.onnx"))
                write_decoder(writer.add(f"graphs/decoder.{formulation}.onnx"), context, in_place=formulation != "qdq")
                graphs += [
                    Graph(purpose, formulation, f"graphs/{purpose}.{formulation}.onnx")  # type: ignore[arg-type]
                    for purpose in ("vision", "decoder")
                ]
            writer.add("golden/inputs.npz").write_bytes(b"inputs")
            sizes = {"hidden": HIDDEN, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab": VOCAB}
            described = {
                "decoder": msgspec.structs.replace(contents.decoder, context=context, **sizes),
                "image": msgspec.structs.replace(contents.image, max_pixels=16 * 28 * 28),
                "graphs": tuple(graphs),
                "stages": {},
                "experts": ExpertsSpec(4, 2, HIDDEN, 16, False),
            }
            writer.commit(msgspec.structs.replace(contents, **(described | changes)))
        return open_bundle(tmp_path / "made")

    return make
