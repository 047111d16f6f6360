"""Where every weight of a bundle lies in its one weights file, and which rows of the checkpoint it is made of.

All graphs of a bundle read the same bytes: int8 weights stand row by row, [out, in], as the checkpoint has them, so
they can be written in row chunks; experts of a layer stand side by side, so that one operator sees them as one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from sonoedge.errors import SonoEdgeError
from sonoedge.export.markers import LM_HEAD, checkpoint_key
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import empty_model
from sonoedge.export.scheme import QuantizationPlan, Scheme

ALIGNMENT = 64  # bytes; what vector loads like
EMBEDDING = "model.embed_tokens"
BYTES = {"int8": 1, "float32": 4}


class Stored(msgspec.Struct, frozen=True):
    """One tensor of the weights file."""

    name: str
    dtype: Literal["int8", "float32"]
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def length(self) -> int:
        """Bytes."""
        return BYTES[self.dtype] * math.prod(self.shape)


class Unit(msgspec.Struct, frozen=True):
    """What is written, and after a halt found again, as one: the values, and their scales when they are int8.

    The rows of `keys` follow each other; `block` is the number of inputs that share a scale (None: a whole row).
    """

    values: Stored
    scale: Stored | None
    keys: tuple[str, ...]
    block: int | None = None

    @property
    def parts(self) -> tuple[Stored, ...]:
        """The stored tensors."""
        return (self.values,) if self.scale is None else (self.values, self.scale)


class Layout(msgspec.Struct, frozen=True):
    """The weights file: its units in the order in which they are written, and every tensor by name, views included."""

    units: tuple[Unit, ...]
    tensors: dict[str, Stored]
    size: int  # bytes

    def weight_bytes(self) -> int:
        """Bytes of values and scales, without what alignment adds."""
        return sum(part.length for unit in self.units for part in unit.parts)


def plan_layout(config: ModelConfig, plan: QuantizationPlan) -> Layout:
    """Lay out every weight of a model for the schemes of `plan`."""
    shapes = {key: tuple(tensor.shape) for key, tensor in empty_model(config).state_dict().items()}
    return _Planner(config, plan, shapes).layout()


class _Planner:
    """Walks the model's keys in order and gives each its place once."""

    def __init__(self, config: ModelConfig, plan: QuantizationPlan, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.config, self.plan, self.shapes = config, plan, shapes
        self.units: list[Unit] = []
        self.tensors: dict[str, Stored] = {}
        self.end = 0

    def layout(self) -> Layout:
        for key in self.shapes:
            if ".moe.experts." in key:
                self.experts(key.partition(".experts.")[0])
                continue
            for scheme in self.schemes_of(key):
                self.matrix(key, scheme)
        return Layout(tuple(self.units), self.tensors, self.end)

    def schemes_of(self, key: str) -> Iterable[Scheme]:
        """The schemes that the weight of `key` is read in: more than one for embeddings tied to the head."""
        product = key.removesuffix(".weight")
        found = [self.plan.schemes.get(product, Scheme.FLOAT)]
        if product == EMBEDDING and self.config.tie_word_embeddings:
            found.append(self.plan.schemes[LM_HEAD])
        if product == EMBEDDING and found[0].block is not None:
            raise SonoEdgeError(
                f"quantization.schemes gives {EMBEDDING} {found[0].value!r}: embeddings take w8a16, float"
            )
        return found

    def matrix(self, key: str, scheme: Scheme) -> None:
        """A parameter: int8 rows with scales, or float32 as it is (convolutions as the matrix they stand for)."""
        shape = self.shapes[key]
        rows, columns = shape[0], math.prod(shape[1:])
        if scheme is Scheme.FLOAT:
            if float_name(key) not in self.tensors:
                flat = (rows,) if len(shape) == 1 else (rows, columns)
                self.units.append(Unit(self.place(float_name(key), "float32", flat), None, (key,)))
        elif int8_name(key, scheme) not in self.tensors:
            values = self.place(int8_name(key, scheme), "int8", (rows, columns))
            scale = self.place(scale_name(key, scheme), "float32", scale_shape(rows, columns, scheme.block))
            self.units.append(Unit(values, scale, (key,), scheme.block))

    def experts(self, mixture: str) -> None:
        """All routed experts of a layer: gate and up rows joined, then down; each kind contiguous over experts."""
        name = f"{mixture}.experts"
        if expert_name(name, 0, "down", "values") in self.tensors:
            return
        assert self.config.moe is not None  # its keys are there
        experts, scheme = self.config.moe.num_experts, self.plan.schemes[name]
        for part, projections in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
            keys = [tuple(f"{name}.{expert}.{p}.weight" for p in projections) for expert in range(experts)]
            rows, columns = sum(self.shapes[key][0] for key in keys[0]), self.shapes[keys[0][0]][1]
            values = self.many(name, part, "values", experts, (rows, columns), scheme)
            scales: list[Stored | None] = [None] * experts
            if scheme is not Scheme.FLOAT:
                shape = scale_shape(rows, columns, scheme.block)
                scales = list(self.many(name, part, "scale", experts, shape, Scheme.FLOAT))
            for value, scale, sources in zip(values, scales, keys, strict=True):
                self.units.append(Unit(value, scale, sources, scheme.block))

    def many(
        self, name: str, part: str, what: str, experts: int, shape: tuple[int, ...], scheme: Scheme
    ) -> list[Stored]:
        """Tensors of one shape without a gap, and a view over all of them."""
        dtype: Literal["int8", "float32"] = "float32" if scheme is Scheme.FLOAT else "int8"
        whole = self.place(f"{name}.{part}_{what}", dtype, (experts, *shape))
        each = whole.length // experts
        views = [
            Stored(expert_name(name, expert, part, what), dtype, shape, whole.offset + expert * each)
            for expert in range(experts)
        ]
        self.tensors |= {view.name: view for view in views}
        return views

    def place(self, name: str, dtype: Literal["int8", "float32"], shape: tuple[int, ...]) -> Stored:
        stored = Stored(name, dtype, shape, -(-self.end // ALIGNMENT) * ALIGNMENT)
        self.end = stored.offset + stored.length
        self.tensors[name] = stored
        return stored


def float_name(key: str) -> str:
    """Name in graphs of a parameter that stays float: the checkpoint's own."""
    return key


def int8_name(key: str, scheme: Scheme) -> str:
    """Name in graphs of the int8 values of a parameter."""
    return f"{key}_int8" if scheme.block is None else f"{key}_int8_block"


def scale_name(key: str, scheme: Scheme) -> str:
    """Name in graphs of the scales of a parameter."""
    return f"{key}_scale" if scheme.block is None else f"{key}_scale_block"


def expert_name(experts: str, expert: int, part: str, what: str) -> str:
    """Name in graphs of one expert's `part` ("gate_up", "down"), its "values" or its "scale"."""
    return f"{experts}.{expert}.{part}_{what}"


def product_key(name: str, config: ModelConfig) -> str:
    """Key of the weight of product `name`: the head of a tied model reads the embeddings."""
    if name == LM_HEAD and config.tie_word_embeddings:
        return checkpoint_key("model.model.embed_tokens.weight")
    return f"{name}.weight"


def scale_shape(rows: int, columns: int, block: int | None) -> tuple[int, ...]:
    """[rows], or [rows, blocks]."""
    return (rows,) if block is None else (rows, -(-columns // block))
