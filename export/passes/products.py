"""One matrix product in one scheme for one purpose: the operators that compute it, over weights stored row by row."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from sonoedge.export.graphs import OPSET
from sonoedge.export.passes.emitter import CONTRIB, Attribute, Emitter
from sonoedge.export.scheme import BLOCK, INT8_MAX, SMALLEST, Scheme

WIDE_BLOCK = 256  # MatMulNBits reads a scale a block: fewer for rows that have one scale anyway
TENSORRT_OPSET = 24  # the first with an update of a cache in place
OFFSET = 128  # what int8 values stand around where an operator takes unsigned ones


class Purpose(Enum):
    """What a graph is for, which decides the fastest operators."""

    PORTABLE = "portable"  # standard operators of an old opset, in float32 and Q/DQ, which most backends read
    TENSORRT = "trt"  # the same for TensorRT: newer operators, cache in place, 16 bit where it multiplies floats
    ROWS = "rows"  # ONNX Runtime, many tokens at once: int8 products
    TOKEN = "token"  # ONNX Runtime, one token at a time: the memory's speed decides


def for_tensorrt(purpose: Purpose) -> bool:
    """Whether TensorRT reads the graph: its newer releases the one, JetPack 6's the portable one."""
    return purpose in (Purpose.PORTABLE, Purpose.TENSORRT)


def opset(purpose: Purpose) -> int:
    """The version of the standard operators in a graph."""
    return TENSORRT_OPSET if purpose is Purpose.TENSORRT else OPSET


class Weights(NamedTuple):
    """The weights of one product as values of a graph, [out, in] row by row."""

    rows: int  # out
    columns: int  # in
    values: ir.Value  # int8, float32, or the int8 bytes seen as uint8 where `needs_bits` says so
    scale: ir.Value | None = None  # float32 [out] or [out, blocks]
    zero: ir.Value | None = (
        None  # int8, shaped as the scale: ONNX Runtime's precise mode fails when it is left out or shared
    )


def needs_bits(scheme: Scheme, purpose: Purpose) -> bool:
    """Whether the product is a MatMulNBits, which takes unsigned weights."""
    if purpose is Purpose.TOKEN:
        return scheme is not Scheme.FLOAT
    return purpose is Purpose.ROWS and scheme is Scheme.W8A16_BLOCK


def needs_zero(scheme: Scheme, purpose: Purpose) -> bool:
    """Whether the weights' zero points are written out."""
    return scheme is not Scheme.FLOAT and not needs_bits(scheme, purpose)


def is_dynamic(scheme: Scheme, purpose: Purpose) -> bool:
    """Whether the input is rounded to int8 with a scale a token.

    ONNX Runtime has no quick product of float rows with int8 weights, so many rows at once go this way too when only
    the weights are meant to be int8.
    """
    return purpose is Purpose.ROWS and scheme in (Scheme.W8A8_DYNAMIC, Scheme.W8A16)


class Inputs:
    """What is computed from a product's input once, however many products share it."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], tuple[ir.Value, ir.Value]] = {}

    def scale(self, emit: Emitter, x: ir.Value, scale: float) -> ir.Value:
        """A fixed scale of x as a value."""
        key = (id(x), scale)
        if key not in self._made:
            value = emit.constant(np.array(scale, np.float32))
            self._made[key] = value, value
        return self._made[key][0]

    def dynamic(self, emit: Emitter, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """x [tokens, in] in int8 (as uint8 around 128) with a scale for each token, and the scales [tokens, 1]."""
        key = (id(x), None)
        if key not in self._made:
            largest = emit("ReduceMax", emit("Abs", x), emit.constant([1]), keepdims=0)  # [tokens]
            floor = emit.constant(np.array(SMALLEST, np.float32))
            scale = emit("Max", emit("Mul", largest, emit.constant(np.array(1 / INT8_MAX, np.float32))), floor)
            # QGemm takes signed rows with signed weights only, and the precise mode makes the weights unsigned.
            zero = emit("Expand", emit.constant(np.array(OFFSET, np.uint8)), emit("Shape", scale))
            int8 = emit("QuantizeLinear", x, scale, zero, axis=0)
            self._made[key] = int8, emit("Unsqueeze", scale, emit.constant([1]))
        return self._made[key]

    def flat(self, emit: Emitter, x: ir.Value, columns: int) -> ir.Value:
        """x as a matrix [tokens, columns]."""
        key = (id(x), "flat")
        if key not in self._made:
            matrix = emit("Reshape", x, emit.constant([-1, columns]))
            self._made[key] = matrix, matrix
        return self._made[key][0]


def product(
    emit: Emitter,
    inputs: Inputs,
    x: ir.Value,
    weights: Weights,
    scheme: Scheme,
    purpose: Purpose,
    scale: ir.Value | None,
) -> ir.Value:
    """x [tokens, in] · weightsᵀ as [tokens, out]; `scale` is that of the input where the scheme has a fixed one."""
    if scheme is Scheme.FLOAT:
        return emit("Gemm", x, weights.values, transB=1)
    if needs_bits(scheme, purpose):
        return _bits(emit, x, weights, scheme)
    if is_dynamic(scheme, purpose):
        int8, token_scale = inputs.dynamic(emit, x)
        one, zero = emit.constant(np.array(1, np.float32)), emit.constant(np.array(OFFSET, np.uint8))
        operands = (int8, one, zero, weights.values, weights.scale, weights.zero)
        return emit("Mul", emit("QGemm", *operands, domain=CONTRIB, transB=1), token_scale)
    if scheme is Scheme.W8A8:
        assert scale is not None  # the plan has one for every product of this scheme
        wide = emit("DequantizeLinear", weights.values, weights.scale, weights.zero, axis=0)
        # Every product rounds its input itself: ONNX Runtime's precise mode fuses no product whose QuantizeLinear is
        # read by another one as well.
        zero = emit.constant(np.array(0, np.int8))
        x = emit("DequantizeLinear", emit("QuantizeLinear", x, scale, zero), scale, zero)
        return emit("Gemm", x, wide, transB=1)
    return _weight_only(emit, x, weights, scheme, purpose)


def _weight_only(emit: Emitter, x: ir.Value, weights: Weights, scheme: Scheme, purpose: Purpose) -> ir.Value:
    """x times int8 weights turned into floats."""
    attributes: dict[str, Attribute] = {"axis": 0} if scheme.block is None else {"axis": 1, "block_size": BLOCK}
    operands = (weights.values, weights.scale, weights.zero)
    if purpose is not Purpose.TENSORRT:
        return emit("Gemm", x, emit.emit("DequantizeLinear", operands, attributes, 1)[0], transB=1)
    # bfloat16, as the released checkpoint computes: float16 cannot hold the largest inputs of its down projections.
    attributes["output_dtype"] = int(ir.DataType.BFLOAT16)
    wide = emit.emit("DequantizeLinear", operands, attributes, 1)[0]
    narrow = emit("Cast", x, to=int(ir.DataType.BFLOAT16))
    return emit("Cast", emit("Gemm", narrow, wide, transB=1), to=int(ir.DataType.FLOAT))


def _bits(emit: Emitter, x: ir.Value, weights: Weights, scheme: Scheme) -> ir.Value:
    """MatMulNBits over the stored bytes; what turns them into its form is folded when the graph is loaded."""
    rows, columns = weights.rows, weights.columns
    block = BLOCK if scheme is Scheme.W8A16_BLOCK or columns < WIDE_BLOCK else WIDE_BLOCK
    blocks = -(-columns // block)
    values = weights.values
    if missing := blocks * block - columns:
        values = emit("Pad", values, emit.constant([0, 0, 0, missing]), emit.constant(np.array(0, np.uint8)))
    unsigned = emit("BitwiseXor", values, emit.constant(np.array(OFFSET, np.uint8)))
    packed = emit("Reshape", unsigned, emit.constant([rows, blocks, block]))
    scale = weights.scale
    if scheme is not Scheme.W8A16_BLOCK:
        scale = emit("Expand", emit("Unsqueeze", scale, emit.constant([1])), emit.constant([rows, blocks]))
    size = {"N": rows, "K": columns, "bits": 8, "block_size": block, "accuracy_level": 4}
    return emit("MatMulNBits", x, packed, scale, domain=CONTRIB, **size)
