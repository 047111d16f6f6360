"""The operators of the project's domain as TensorRT's quickly deployable plugins; a bundle carries their kernels.

Runs on the device, without Triton. TensorRT's ONNX parser takes a node for the plugin of the node's `op_type` in the
namespace that its attribute `plugin_namespace` names, hands the plugin the node's attributes by name, and asks for the
kernel compiled ahead of time where the node says `aot = 1`. Source: NVIDIA, TensorRT (tensorrt.plugin; onnx-tensorrt).
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Any, Concatenate, TypeVar

import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.export.plugins.artifact import KernelIndex, read_index, read_ptx
from sonoedge.export.plugins.dispatch import (
    DOMAIN,
    KERNELS,
    Buffer,
    Experts,
    Kernel,
    Tile,
    grid,
    output_shapes,
    tiles,
)

if TYPE_CHECKING:
    from tensorrt import plugin as trtp

_Rows = TypeVar("_Rows", int, "trtp.ShapeExpr")

# What a node carries beside the fields of `Experts`, so that TensorRT's parser finds the plugin.
NODE_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
# The parser hands numbers over as arrays of one; asked for as `int` they would fail where NumPy converts no such array.
_NUMBER = npt.NDArray[np.int32]
_TELLING = {"ExpertDown": "block_expert", "ExpertSum": "token_slot"}  # inputs of slots first: not how many tokens
_TYPE_NAMES = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "int8": "INT8", "int32": "INT32"}
_DATA_TYPES = {"float16": "HALF", "bfloat16": "BF16", "float32": "FLOAT", "int8": "INT8", "int32": "INT32"}


def register_plugins(folder: Path, sm: int, ptx_version: int) -> None:
    """Make the kernels of a bundle's folder known to TensorRT, for this process, an SM and the driver's PTX version.

    Raises SonoEdgeError when TensorRT has no plugins compiled ahead of time, for a second call in a process, and for a
    bundle without kernels for the SM and the PTX version.
    """
    import tensorrt as trt

    if not hasattr(trt, "QuickPluginCreationRequest"):
        raise SonoEdgeError(
            f"TensorRT {trt.__version__} takes no plugins compiled ahead of time: build from the graphs without, or "
            "install TensorRT 10.9 or newer"
        )
    import tensorrt.plugin as trtp

    if hasattr(trtp.op, DOMAIN):
        raise SonoEdgeError("this process has registered a bundle's kernels already: start another for another bundle")
    index = read_index(folder)
    index.check_target(sm, ptx_version)
    for kernel in KERNELS.values():
        operator = _Operator(kernel, index, folder, sm, ptx_version)
        plugin = f"{DOMAIN}::{kernel.operator}"
        tensor = trtp.TensorDesc
        several = GenericAlias(tuple, (tensor,) * len(kernel.outputs))
        made = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
        outputs = {"outputs": several}
        trtp.register(plugin)(_Described(kernel, operator.describe, tensor, {}, several))
        trtp.autotune(plugin)(
            _Described(kernel, operator.tactics, tensor, outputs, GenericAlias(list, (trtp.AutoTuneCombination,)))
        )
        trtp.aot_impl(plugin)(_Described(kernel, operator.launch, tensor, outputs | {"tactic": int}, made))


def tokens_told(operator: str, experts: Experts, rows: _Rows) -> _Rows:
    """Return the number of tokens that a kernel is told, from the rows of the input that tells it.

    `ExpertDown` sees blocks only and gets the most tokens that so many hold: all that its kernel does with the number
    is to reckon the blocks from it, which gives the same for any number of tokens that needs them.
    """
    if operator != "ExpertDown":
        return rows
    return (rows - (experts.experts - 1)) * experts.block_rows // experts.chosen


class _Described:
    """A function whose parameters TensorRT can read: the tensors, the node's attributes, and what a role adds."""

    def __init__(
        self,
        kernel: Kernel,
        function: Callable[Concatenate[Sequence["trtp.TensorDesc"], Experts, ...], Any],
        tensor: type,
        added: dict[str, Any],
        returns: Any,
    ) -> None:
        self._tensors = [buffer.name for buffer in kernel.inputs]
        self._function, self._added = function, list(added)
        types = {**dict.fromkeys(self._tensors, tensor), **dict.fromkeys(Experts.__struct_fields__, _NUMBER), **added}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=type_) for name, type_ in types.items()]
        self.__signature__ = inspect.Signature(parameters, return_annotation=returns)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        given = self.__signature__.bind(*positional, **named).arguments
        experts = Experts(**{name: given[name].item() for name in Experts.__struct_fields__})
        return self._function([given[name] for name in self._tensors], experts, *(given[name] for name in self._added))


class _Operator:
    """What TensorRT asks of one operator: its outputs, its tactics, and the kernel of a tactic."""

    def __init__(self, kernel: Kernel, index: KernelIndex, folder: Path, sm: int, ptx_version: int) -> None:
        self._kernel, self._index, self._folder = kernel, index, folder
        self._sm, self._ptx_version = sm, ptx_version
        # The input whose first axis is one token or, for want of such an input, one block.
        self._telling = [buffer.name for buffer in kernel.inputs].index(
            _TELLING.get(kernel.operator, kernel.inputs[0].name)
        )

    def describe(self, inputs: Sequence["trtp.TensorDesc"], experts: Experts) -> "tuple[trtp.TensorDesc, ...]":
        """Shapes and types of the outputs."""
        import tensorrt as trt
        import tensorrt.plugin as trtp

        shapes = output_shapes(self._kernel.operator, experts, self._tokens(inputs, experts))
        types = [getattr(trt.DataType, _DATA_TYPES[self._dtype(buffer)]) for buffer in self._kernel.outputs]
        return tuple(trtp.from_shape_expr(shape, type_) for shape, type_ in zip(shapes, types, strict=True))

    def tactics(
        self, inputs: Sequence["trtp.TensorDesc"], experts: Experts, _outputs: object
    ) -> "list[trtp.AutoTuneCombination]":
        """The one combination of types, with a number from 1 up for each tile."""
        import tensorrt.plugin as trtp

        names = [_TYPE_NAMES[self._dtype(buffer)] for buffer in (*self._kernel.inputs, *self._kernel.outputs)]
        numbers = range(1, len(self._tiles(inputs, experts)) + 1)
        return [trtp.AutoTuneCombination(", ".join(names), "LINEAR", list(numbers))]

    def launch(
        self, inputs: Sequence["trtp.TensorDesc"], experts: Experts, _outputs: object, tactic: int
    ) -> "tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]":
        """Entry, PTX, launch and scalars of a tactic."""
        import tensorrt.plugin as trtp

        # Tactic 0 is TensorRT's word for the default, where it tunes nothing: the likeliest tile.
        tile = self._tiles(inputs, experts)[max(tactic, 1) - 1]
        artifact = self._index.find(self._kernel, experts, tile, self._sm, self._ptx_version)
        tokens = self._tokens(inputs, experts)
        launch = trtp.KernelLaunchParams(
            *grid(self._kernel.operator, experts, tile, tokens),
            block_x=artifact.threads,
            shared_mem=artifact.shared_memory_bytes,
        )
        scalars = trtp.SymIntExprs(1)
        scalars[0] = trtp.SymInt32(tokens)
        return artifact.entry, read_ptx(self._folder, artifact), launch, scalars

    def _tokens(self, inputs: Sequence["trtp.TensorDesc"], experts: Experts) -> "trtp.ShapeExpr":
        """The number of tokens as a symbolic dimension."""
        return tokens_told(self._kernel.operator, experts, inputs[self._telling].shape_expr[0])

    def _tiles(self, inputs: Sequence["trtp.TensorDesc"], experts: Experts) -> tuple[Tile, ...]:
        """The tiles for the largest number of tokens of the optimization profile at hand."""
        shape = inputs[self._telling].shape
        largest = shape.max[0] if shape.is_dynamic else shape[0]
        return tiles(self._kernel.operator, experts, tokens_told(self._kernel.operator, experts, largest))

    def _dtype(self, buffer: Buffer) -> str:
        return self._index.activation if buffer.dtype == "A" else buffer.dtype
