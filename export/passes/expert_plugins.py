"""The routed experts of a layer as plugins: nodes of the project's domain whose kernels the bundle carries.

Source of the operators' meaning: `sonoedge.export.plugins.oracle`.
"""

from __future__ import annotations

from enum import Enum

import msgspec
import onnx_ir as ir

from sonoedge.export.markers import DOMAIN
from sonoedge.export.passes.emitter import Attribute, Emitter


class Dispatch(Enum):
    """How routed experts run."""

    FUNCTION = "function"  # as the ONNX function that says what they compute
    GROUPED = "grouped"  # many tokens: int8 products over blocks of tokens that chose one expert
    CHOSEN = "chosen"  # few tokens: products with int8 weights that read only the experts chosen


class ExpertWeights(msgspec.Struct, frozen=True):
    """What all experts of a layer hold, as values of a graph."""

    gate_up: ir.Value  # int8 [experts, 2 · inner, hidden]
    gate_up_scale: ir.Value  # float32 [experts, 2 · inner]
    down: ir.Value  # int8 [experts, hidden, inner]
    down_scale: ir.Value  # float32 [experts, hidden]


def grouped(
    emit: Emitter,
    x: ir.Value,
    logits: ir.Value,
    weights: ExpertWeights,
    input_scale: ir.Value,
    hidden_scale: ir.Value,
    sizes: dict[str, Attribute],
) -> ir.Value:
    """x [tokens, hidden] and router logits [tokens, experts] to the experts' mix [tokens, hidden], all products int8.

    input_scale float32 [1], hidden_scale float32 [experts].
    """
    routed = emit.emit("ExpertRoute", (x, logits, input_scale), sizes, 5, DOMAIN)
    x_int8, block_expert, slot_token, slot_weight, token_slot = routed
    inputs = (x_int8, weights.gate_up, weights.gate_up_scale, input_scale, hidden_scale, block_expert, slot_token)
    hidden = emit.emit("ExpertUp", inputs, sizes, 1, DOMAIN)[0]
    inputs_down = (hidden, weights.down, weights.down_scale, hidden_scale, block_expert, slot_weight)
    parts = emit.emit("ExpertDown", inputs_down, sizes, 1, DOMAIN)[0]
    return emit.emit("ExpertSum", (parts, token_slot), sizes, 1, DOMAIN)[0]


def chosen(
    emit: Emitter, x: ir.Value, logits: ir.Value, weights: ExpertWeights, sizes: dict[str, Attribute]
) -> ir.Value:
    """The same mix for a few tokens: x as it is, int8 weights, only the experts that a token chose are read."""
    inputs = (x, logits, weights.gate_up, weights.gate_up_scale)
    hidden = emit.emit("ExpertUpDecode", inputs, sizes, 1, DOMAIN)[0]
    return emit.emit("ExpertDownDecode", (hidden, logits, weights.down, weights.down_scale), sizes, 1, DOMAIN)[0]
