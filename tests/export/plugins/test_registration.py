"""The plugins' registration, run by the published Python source of TensorRT's bindings up to each kernel's launch.

TensorRT's libraries cannot be installed here, so a stand-in takes the place of the bindings' compiled module: its enums
have the same names, its dimensions are numbers, and a node's attributes arrive as ONNX's parser sends them, as arrays.
"""

from __future__ import annotations

import ast
import enum
import hashlib
import importlib.util
import inspect
import operator
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins import registration
from sonoedge.export.plugins.artifact import INDEX_FILE, Artifact, KernelIndex, encode_index, read_index
from sonoedge.export.plugins.dispatch import DECODE, KERNELS, Experts, Kernel, grid, output_shapes, tiles
from sonoedge.export.plugins.kernel_set import KernelChoice, choices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EXPERTS = Experts(experts=5, chosen=3, hidden=96, inner=48, norm_topk_prob=True, block_rows=32)
PREFILL_TOKENS = (50, 300)
DECODE_TOKENS = (1, 2, 8)
SM, PTX = 87, 92
STUB = Path(__file__).parents[3] / "typings" / "tensorrt" / "plugin.pyi"


# ------------------------------------------------------------------------------------------------ the stand-in
class Dimension:
    """An IDimensionExpr that is a number."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Operation(enum.Enum):
    SUM, PROD, MAX, MIN, SUB, EQUAL, LESS, FLOOR_DIV, CEIL_DIV = range(9)


OPERATIONS: dict[Operation, Callable[[int, int], int]] = {
    Operation.SUM: operator.add,
    Operation.SUB: operator.sub,
    Operation.PROD: operator.mul,
    Operation.FLOOR_DIV: operator.floordiv,
}


class ExprBuilder:
    """Computes at once; dimensions are never negative."""

    def constant(self, value: int) -> Dimension:
        assert value >= 0
        return Dimension(value)

    def operation(self, which: Operation, first: Dimension, second: Dimension) -> Dimension:
        return self.constant(OPERATIONS[which](first.value, second.value))


class Field:
    """A PluginField, whose data are an array whatever its length."""

    def __init__(self, name: str, data: Any, kind: Any) -> None:
        self.name, self.data, self.type = name, data, kind


class Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        assert creator.plugin_namespace == namespace
        self.creators[creator.name, creator.plugin_version, namespace] = creator

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class TensorDesc:
    """A PluginTensorDesc."""

    def __init__(self) -> None:
        self.dims: tuple[int, ...] = ()
        self.type: Any = None
        self.format: Any = None
        self.scale = -1.0


class DynamicDesc:
    """A DynamicPluginTensorDesc of an optimization profile whose sizes are fixed; `dynamic` in the network itself."""

    def __init__(self, dims: tuple[int, ...], type_: Any, format_: Any, *, dynamic: bool) -> None:
        self.desc = TensorDesc()
        self.desc.dims = (-1, *dims[1:]) if dynamic else dims
        self.desc.type, self.desc.format = type_, format_
        self.min = self.opt = self.max = dims


class Launch:
    """What get_launch_params fills in."""

    grid_x: Any
    grid_y: Any
    grid_z: Any
    block_x: Any
    block_y: Any
    block_z: Any
    shared_mem: Any


class Scalars(dict[int, Any]):
    """What get_launch_params puts the scalar parameters in."""

    nbSymExprs = 0


def _stand_in() -> Any:
    """A module `tensorrt` with what the plugin package takes from the compiled one."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__path__ = []
    trt.__version__ = "10.16.1.11"
    registry = Registry()
    empty = (
        "ITensor IPluginV3 IPluginV3QuickCore IPluginV3QuickBuild IPluginV3QuickRuntime IPluginV3QuickAOTBuild "
        "IPluginCreatorV3Quick ISymExpr"
    )
    for name in empty.split():
        setattr(trt, name, type(name, (), {}))
    enums = {
        "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4",
        "TensorFormat": "LINEAR CHW2 HWC8",
        "PluginFieldType": "FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 CHAR DIMS UNKNOWN BF16 INT64",
        "PluginArgType": "INT",
        "PluginArgDataType": "INT8 INT16 INT32",
        "TensorRTPhase": "BUILD RUNTIME",
        "QuickPluginCreationRequest": "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT",
    }
    for name, members in enums.items():
        setattr(trt, name, enum.Enum(name, members))
    trt.int32 = trt.DataType.INT32
    trt.DimensionOperation, trt.IDimensionExpr, trt.IExprBuilder = Operation, Dimension, ExprBuilder
    trt.PluginField, trt.PluginFieldCollection = Field, list
    trt.PluginTensorDesc, trt.DynamicPluginTensorDesc = TensorDesc, DynamicDesc
    trt.Dims = type("Dims", (tuple,), {"MAX_DIMS": 8})
    trt.DimsExprs = lambda length: [None] * length
    trt.get_plugin_registry = lambda: registry

    class Logger:
        WARNING = 2

        def log(self, severity: int, text: str) -> None:
            """Say nothing."""

    trt.Logger = Logger
    return trt


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module `tensorrt` whose `tensorrt.plugin` is the published source, as new as in a new process."""
    # Found, not imported: the bindings' compiled module needs TensorRT's libraries.
    found = importlib.util.find_spec("tensorrt_bindings")
    if found is None or found.origin is None:
        pytest.skip("needs the package tensorrt_cu13_bindings, which has wheels for x86-64 only")
    source = Path(found.origin).parent / "plugin"
    module = _stand_in()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", source / "__init__.py", submodule_search_locations=[str(source)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", package)
    module.plugin = package
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes in its docstrings
        spec.loader.exec_module(package)
    yield module
    for name in [name for name in sys.modules if name.startswith("tensorrt.plugin.")]:
        del sys.modules[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle's folder of kernels that were never compiled: registering only hands them over."""
    wanted = choices(EXPERTS, "float16", PREFILL_TOKENS, DECODE_TOKENS)
    return _write(tmp_path, [_artifact(choice, tmp_path) for choice in wanted])


def _artifact(choice: KernelChoice, folder: Path) -> Artifact:
    ptx = f"// {choice.name}"
    (folder / f"{choice.name}.ptx").write_text(ptx)
    return Artifact(
        name=choice.name,
        operator=choice.kernel.operator,
        constants=choice.kernel.values(choice.experts, choice.tile),
        entry=choice.kernel.function,
        sm=SM,
        ptx=PTX,
        num_warps=choice.tile.num_warps,
        num_stages=choice.tile.num_stages,
        shared_memory_bytes=1024 + len(choice.name),
        registers=1,
        spills=0,
        parameters=choice.parameters,
        file=f"{choice.name}.ptx",
        sha256=hashlib.sha256(ptx.encode()).hexdigest(),
    )


def _write(folder: Path, artifacts: list[Artifact]) -> Path:
    index = KernelIndex(activation="float16", experts=EXPERTS, artifacts=tuple(artifacts))
    (folder / INDEX_FILE).write_bytes(encode_index(index))
    return folder


# --------------------------------------------------------------------------------------------------- the tests
class Node:
    """One node of a network, taken through the calls that TensorRT makes of its plugin."""

    def __init__(self, trt: Any, kernel: Kernel, tokens: int, *, dynamic: bool = True) -> None:
        self.trt, self.kernel, self.tokens = trt, kernel, tokens
        creator = trt.get_plugin_registry().get_creator(kernel.operator, "1", "sonoedge")
        given = msgspec.to_builtins(EXPERTS)
        fields = [
            Field(field.name, np.array([int(given[field.name])], np.int32), trt.PluginFieldType.INT32)
            for field in creator.field_names
        ]
        request = trt.QuickPluginCreationRequest.STRICT_AOT
        self.plugin = creator.create_plugin(kernel.operator, "sonoedge", fields, trt.TensorRTPhase.BUILD, request)
        types_ = {"A": "HALF", "float32": "FLOAT", "int8": "INT8", "int32": "INT32"}
        self.types = [trt.DataType[types_[buffer.dtype]] for buffer in kernel.inputs]
        self.shapes = _input_shapes(kernel, tokens)
        self.output_types = self.plugin.get_output_data_types(self.types, [len(shape) for shape in self.shapes])
        dims = [[Dimension(size) for size in shape] for shape in self.shapes]
        self.dims = dims
        exprs = self.plugin.get_output_shapes(dims, [], ExprBuilder())
        self.output_shapes = tuple(tuple(dim.value for dim in shape) for shape in exprs)
        self.in_out = [
            DynamicDesc(shape, type_, trt.TensorFormat.LINEAR, dynamic=dynamic)
            for shape, type_ in zip((*self.shapes, *self.output_shapes), (*self.types, *self.output_types), strict=True)
        ]

    def tactics(self) -> list[int]:
        combinations = self.plugin.get_supported_format_combinations(self.in_out, len(self.shapes))
        assert [one.type for one in combinations] == [*self.types, *self.output_types]
        assert {one.format for one in combinations} == {self.trt.TensorFormat.LINEAR}
        count = len(self.shapes)
        self.plugin.configure_plugin(self.in_out[:count], self.in_out[count:])
        return sorted(self.plugin.get_valid_tactics())

    def launch(self, tactic: int) -> tuple[Launch, list[int]]:
        self.plugin.set_tactic(tactic)
        launch, scalars = Launch(), Scalars()
        self.plugin.get_launch_params(self.dims, self.in_out, len(self.shapes), launch, scalars, ExprBuilder())
        assert scalars.nbSymExprs == len(scalars) == 1
        assert scalars[0].dtype is self.trt.PluginArgDataType.INT32
        return launch, [scalars[0].expr.value]

    def code(self) -> tuple[str, bytes]:
        count = len(self.shapes)
        descs = [one.desc for one in self.in_out]
        name, ptx = self.plugin.get_kernel(descs[:count], descs[count:])
        return name, ptx


def _input_shapes(kernel: Kernel, tokens: int) -> list[tuple[int, ...]]:
    """Shapes of a node's inputs, from what the nodes before it give out."""
    one = EXPERTS
    known: dict[str, tuple[int, ...]] = {
        "x": (tokens, one.hidden),
        "logits": (tokens, one.experts),
        "input_scale": (1,),
        "hidden_scale": (one.experts,),
        "gate_up_values": (one.experts, 2 * one.inner, one.hidden),
        "gate_up_scale": (one.experts, 2 * one.inner),
        "down_values": (one.experts, one.hidden, one.inner),
        "down_scale": (one.experts, one.hidden),
    }
    for before in KERNELS.values():
        shapes = output_shapes(before.operator, one, tokens)
        known |= {buffer.name: shape for buffer, shape in zip(before.outputs, shapes, strict=True)}
    return [known[buffer.name] for buffer in kernel.inputs]


def _counts(kernel: Kernel) -> tuple[int, ...]:
    return DECODE_TOKENS if kernel in DECODE else PREFILL_TOKENS


CASES = [(kernel, tokens) for kernel in KERNELS.values() for tokens in _counts(kernel)]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("kernel", "tokens"), CASES, ids=[f"{k.operator}-{tokens}" for k, tokens in CASES])
def test_every_tactic_is_launched_as_dispatch_reckons(
    trt: Any, folder: Path, kernel: Kernel, tokens: int, dynamic: bool
) -> None:
    registration.register_plugins(folder, SM, PTX)
    node = Node(trt, kernel, tokens, dynamic=dynamic)

    assert node.output_shapes == output_shapes(kernel.operator, EXPERTS, tokens)
    expected = {"A": "HALF", "float32": "FLOAT", "int8": "INT8", "int32": "INT32"}
    assert [type_.name for type_ in node.output_types] == [expected[buffer.dtype] for buffer in kernel.outputs]

    ways = tiles(kernel.operator, EXPERTS, tokens)
    assert node.tactics() == list(range(1, len(ways) + 1))
    for tactic, tile in enumerate(ways, start=1):
        launch, scalars = node.launch(tactic)
        given = [axis.expr.value for axis in (launch.grid_x, launch.grid_y, launch.grid_z)]
        assert given == list(grid(kernel.operator, EXPERTS, tile, tokens))
        assert [axis.expr.value for axis in (launch.block_x, launch.block_y, launch.block_z)] == [
            32 * tile.num_warps, 1, 1,
        ]  # fmt: skip
        choice = KernelChoice(kernel, EXPERTS, tile, "float16")
        assert launch.shared_mem.expr.value == 1024 + len(choice.name)
        assert node.code() == (kernel.function, f"// {choice.name}".encode())
        if kernel.operator == "ExpertDown":
            assert scalars[0] >= tokens
            assert EXPERTS.blocks(scalars[0]) == EXPERTS.blocks(tokens)
        else:
            assert scalars == [tokens]


def test_the_default_tactic_is_the_likeliest_tile(trt: Any, folder: Path) -> None:
    registration.register_plugins(folder, SM, PTX)
    node = Node(trt, KERNELS["ExpertUp"], 50)
    node.tactics()
    node.launch(0)
    first = tiles("ExpertUp", EXPERTS, 50)[0]
    assert node.code()[1] == f"// expert_up-{first.name}".encode()


@given(
    experts=st.integers(1, 64),
    chosen=st.integers(1, 16),
    rows=st.sampled_from((16, 32, 64, 128)),
    tokens=st.integers(1, 5000),
)
def test_blocks_tell_as_many_tokens_as_need_the_same_blocks(experts: int, chosen: int, rows: int, tokens: int) -> None:
    sizes = Experts(
        experts=experts, chosen=min(chosen, experts), hidden=16, inner=16, norm_topk_prob=False, block_rows=rows
    )
    reckoned = registration.tokens_told("ExpertDown", sizes, sizes.blocks(tokens))
    assert reckoned >= tokens
    assert sizes.blocks(reckoned) == sizes.blocks(tokens)


def test_a_process_serves_one_bundle(trt: Any, folder: Path) -> None:
    registration.register_plugins(folder, SM, PTX)
    with pytest.raises(SonoEdgeError, match="registered a bundle's kernels already: start another"):
        registration.register_plugins(folder, SM, PTX)


@pytest.mark.parametrize(("sm", "ptx"), [(110, 92), (87, 90)])
def test_kernels_of_another_device_are_refused(trt: Any, folder: Path, sm: int, ptx: int) -> None:
    with pytest.raises(SonoEdgeError, match=rf"for sm_87 with PTX 9\.2, and this is sm_{sm} with PTX up to {ptx / 10}"):
        registration.register_plugins(folder, sm, ptx)


def test_a_newer_driver_takes_older_ptx(trt: Any, folder: Path) -> None:
    registration.register_plugins(folder, SM, 94)
    node = Node(trt, KERNELS["ExpertSum"], 50)
    node.tactics()
    node.launch(1)
    assert node.code()[0] == "expert_sum"


def test_a_tile_without_a_kernel_is_refused(trt: Any, folder: Path) -> None:
    _write(folder, [one for one in read_index(folder).artifacts if one.operator != "ExpertSum"])
    registration.register_plugins(folder, SM, PTX)
    node = Node(trt, KERNELS["ExpertSum"], 50)
    node.tactics()
    with pytest.raises(SonoEdgeError, match=r"no kernel ExpertSum .* for sm_87 .* and its buckets"):
        node.launch(1)


def test_a_damaged_kernel_is_refused(trt: Any, folder: Path) -> None:
    for path in folder.glob("expert_sum*.ptx"):
        path.write_text("// other")
    registration.register_plugins(folder, SM, PTX)
    node = Node(trt, KERNELS["ExpertSum"], 50)
    node.tactics()
    with pytest.raises(SonoEdgeError, match="SHA-256 differs"):
        node.launch(1)


def test_tensorrt_without_ahead_of_time_plugins_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    old = types.ModuleType("tensorrt")
    old.__version__ = "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", old)
    with pytest.raises(SonoEdgeError, match=r"TensorRT 10\.3\.0 takes no plugins compiled ahead of time"):
        registration.register_plugins(folder, SM, PTX)


def test_a_device_needs_neither_compiler_nor_torch() -> None:
    script = (
        "import sys, sonoedge.export.plugins.registration\n"
        "heavy = {'torch', 'triton', 'onnx', 'onnx_ir', 'transformers', 'tensorrt'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_node_says_what_the_parser_needs() -> None:
    assert registration.NODE_ATTRIBUTES == {"plugin_namespace": "sonoedge", "plugin_version": "1", "aot": 1}


def test_the_types_that_calls_are_checked_with_are_the_published_ones(trt: Any) -> None:
    checked = 0
    for item in ast.parse(STUB.read_text()).body:
        match item:
            case ast.FunctionDef():
                checked += _agrees(item, getattr(trt.plugin, item.name))
            case ast.ClassDef():
                published = getattr(trt.plugin._tensor, item.name, None) or getattr(trt.plugin, item.name)
                bases = {base.id for base in item.bases if isinstance(base, ast.Name)}
                assert bases <= {base.__name__ for base in published.__mro__}, item.name
                for member in item.body:
                    if isinstance(member, ast.FunctionDef):
                        assert hasattr(published, member.name), f"{item.name}.{member.name}"
                        found = inspect.getattr_static(published, member.name)
                        properties = [node.id for node in member.decorator_list if isinstance(node, ast.Name)]
                        assert isinstance(found, property) == ("property" in properties), member.name
                        checked += _agrees(member, getattr(published, member.name))
    assert checked >= 15


def _agrees(stub: ast.FunctionDef, published: Any) -> int:
    """Compare the names, the order and the defaults of a function's parameters; 1 if it could be compared."""
    if isinstance(published, property):
        return 0
    parameters = [p for p in inspect.signature(published).parameters.values() if p.name not in ("self", "cls")]
    arguments = [argument.arg for argument in stub.args.args if argument.arg not in ("self", "cls")]
    assert arguments == [parameter.name for parameter in parameters], stub.name
    optional = sum(parameter.default is not inspect.Parameter.empty for parameter in parameters)
    assert len(stub.args.defaults) == optional, stub.name
    return 1
