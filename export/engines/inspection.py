"""What a builder made of a graph: the layers of an engine with the types that they read and write."""

import math
import re

import msgspec

_LAYER = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[\w ]+), (?P<rest>.*)")
_TENSORS = re.compile(r"(?P<role>Inputs|Constants|Outputs): \[(?P<tensors>(?: \{[^{}]*\},?)*) ?\]")
_TENSOR = re.compile(r"\{([^{}]*)\}")
_TYPE = re.compile(r"Datatype: (\w+)")
_SIZES = re.compile(r"Dimensions: \[([-\d,]*)\]")
_METADATA = ", Metadata: "

INT8 = "Int8"


class Tensor(msgspec.Struct, frozen=True):
    """One tensor that a layer reads or writes; a size that differs from run to run is -1."""

    dtype: str  # as the builder names it: Int8, Half, Float, …
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many values it has; those of one row where the rows differ from run to run."""
        return abs(math.prod(self.shape))

    @property
    def is_matrix(self) -> bool:
        """Whether it is more than a scalar or a row."""
        return sum(size != 1 for size in self.shape) >= 2


class Layer(msgspec.Struct, frozen=True):
    """One layer of an engine, often many nodes of the graph fused."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]  # constants among them
    outputs: tuple[Tensor, ...]
    origin: str  # "[ONNX Layer: name]" of every node that it computes

    @property
    def multiplies_int8(self) -> bool:
        """Whether it reads int8 weights and int8 activations."""
        int8 = [tensor for tensor in self.inputs if tensor.dtype == INT8 and tensor.count > 1]
        return len(int8) >= 2 and any(tensor.is_matrix for tensor in int8)

    @property
    def reads_int8_weights(self) -> bool:
        """Whether it reads an int8 matrix."""
        return any(tensor.dtype == INT8 and tensor.is_matrix for tensor in self.inputs)

    @property
    def unpacks(self) -> bool:
        """Whether it does nothing but write int8 weights out in another type, for another layer to read."""
        matrices = [tensor for tensor in self.inputs if tensor.is_matrix]
        if len(matrices) != 1 or matrices[0].dtype != INT8:
            return False
        return any(tensor.dtype != INT8 and tensor.count == matrices[0].count for tensor in self.outputs)


def parse_layers(listing: str) -> tuple[Layer, ...]:
    """Read the listing that a builder logs and an engine inspector gives on one line a layer, all profiles in turn.

    TensorRT names a tensor's type "Format/Datatype" and counts constants among the inputs; TensorRT-RTX does neither.
    """
    return tuple(_layer(found) for line in listing.splitlines() if (found := _LAYER.match(line)))


def _layer(found: re.Match[str]) -> Layer:
    described, _, origin = found["rest"].partition(_METADATA)
    tensors: dict[str, tuple[Tensor, ...]] = {}
    for group in _TENSORS.finditer(described):
        tensors[group["role"]] = tuple(_tensor(text) for text in _TENSOR.findall(group["tensors"]))
    inputs = (*tensors.get("Inputs", ()), *tensors.get("Constants", ()))
    return Layer(found["name"], found["kind"], inputs, tensors.get("Outputs", ()), origin)


def _tensor(text: str) -> Tensor:
    dtype, sizes = _TYPE.search(text), _SIZES.search(text)
    shape = tuple(int(size) for size in sizes[1].split(",") if size) if sizes else ()
    return Tensor(dtype[1] if dtype else "unknown", shape)
