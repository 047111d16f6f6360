"""What the expert kernels must compute, in NumPy: every operator, written for reading.

Integers are exact. Activations are float32 arrays whose values the activation type holds; sums of products that a
kernel takes in float32 are taken in float64 here, so that where a kernel's own sums are exact the results are the same
bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.export.plugins.dispatch import Activation, Experts

Float = npt.NDArray[np.float32]
Int8 = npt.NDArray[np.int8]
Int32 = npt.NDArray[np.int32]
Wide = npt.NDArray[np.float64]


class Routed(msgspec.Struct, frozen=True):
    """Outputs of `ExpertRoute`, in order."""

    x_int8: Int8  # [N, H]
    block_expert: Int32  # [blocks]; E marks an empty block
    slot_token: Int32  # [slots]; N marks an empty slot
    slot_weight: Float  # [slots]; 0 in empty slots
    token_slot: Int32  # [N, k], a token's experts in the order of their index


def rounded(values: npt.NDArray[np.floating], activation: Activation) -> Float:
    """Finite values in the nearest floats of the activation type, half to even, as float32."""
    if activation == "float32":
        return values.astype(np.float32)
    if activation == "float16":
        return values.astype(np.float16).astype(np.float32)
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept: Float = (nearest & np.uint32(0xFFFF0000)).view(np.float32)
    return kept


def quantized(values: Float, scale: np.float32) -> Int8:
    """ONNX QuantizeLinear to int8 with zero point 0: half to even, saturating."""
    return np.clip(np.rint(values / scale), -128, 127).astype(np.int8)


def silu(values: Float) -> Float:
    """x · sigmoid(x); -0 where exp overflows."""
    with np.errstate(over="ignore"):
        product: Float = values / (np.float32(1) + np.exp(-values))
    return product


def chosen_experts(logits: Float, chosen: int) -> npt.NDArray[np.bool_]:
    """The largest `chosen` logits of each row [N, E], of equal ones those with the lower index."""
    order = np.argsort(-logits, axis=1, kind="stable")[:, :chosen]
    mask = np.zeros(logits.shape, np.bool_)
    np.put_along_axis(mask, order, True, axis=1)
    return mask


def expert_weights(logits: Float, experts: Experts) -> Float:
    """Softmax over all experts [N, E], over the chosen ones alone with norm_topk_prob; 0 for those not chosen."""
    mask = chosen_experts(logits, experts.chosen)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    total = np.where(mask, shares, np.float32(0)) if experts.norm_topk_prob else shares
    weights: Float = np.where(mask, shares / total.sum(axis=1, keepdims=True), np.float32(0))
    return weights


def route(x: Float, logits: Float, input_scale: Float, experts: Experts) -> Routed:
    """`ExpertRoute` of x [N, H] and logits [N, E]."""
    tokens = len(x)
    mask = chosen_experts(logits, experts.chosen)
    weights = expert_weights(logits, experts)
    block_expert = np.full(experts.blocks(tokens), experts.experts, np.int32)
    slot_token = np.full(experts.slots(tokens), tokens, np.int32)
    slot_weight = np.zeros(experts.slots(tokens), np.float32)
    slots = np.zeros((tokens, experts.experts), np.int32)
    block = 0
    for expert in range(experts.experts):
        takers = np.flatnonzero(mask[:, expert])
        blocks = -(-len(takers) // experts.block_rows)
        places = block * experts.block_rows + np.arange(len(takers))
        block_expert[block : block + blocks] = expert
        slot_token[places] = takers
        slot_weight[places] = weights[takers, expert]
        slots[takers, expert] = places
        block += blocks
    token_slot = slots[mask].reshape(tokens, experts.chosen)
    return Routed(quantized(x, input_scale[0]), block_expert, slot_token, slot_weight, token_slot)


def up(
    x_int8: Int8,
    gate_up_values: Int8,
    gate_up_scale: Float,
    input_scale: Float,
    hidden_scale: Float,
    block_expert: Int32,
    slot_token: Int32,
    experts: Experts,
) -> Int8:
    """`ExpertUp`: int8 [slots, I]; zeros where no token is (kernels leave empty blocks as they were)."""
    hidden = np.zeros((len(slot_token), experts.inner), np.int8)
    for expert in range(experts.experts):
        slots = _slots_of(expert, block_expert, experts)
        slots = slots[slot_token[slots] < len(x_int8)]
        total = _products(x_int8[slot_token[slots]], gate_up_values[expert]).astype(np.int32)
        value = total.astype(np.float32) * (input_scale[0] * gate_up_scale[expert])
        gate, linear = np.split(value, 2, axis=1)
        hidden[slots] = quantized(silu(gate) * linear, hidden_scale[expert])
    return hidden


def down(
    hidden: Int8,
    down_values: Int8,
    down_scale: Float,
    hidden_scale: Float,
    block_expert: Int32,
    slot_weight: Float,
    experts: Experts,
    activation: Activation,
) -> Float:
    """`ExpertDown`: [slots, H]; zeros in empty blocks (kernels leave them as they were)."""
    parts = np.zeros((len(hidden), experts.hidden), np.float32)
    for expert in range(experts.experts):
        slots = _slots_of(expert, block_expert, experts)
        total = _products(hidden[slots], down_values[expert]).astype(np.int32)
        value = total.astype(np.float32) * (hidden_scale[expert] * down_scale[expert]) * slot_weight[slots, None]
        parts[slots] = rounded(value, activation)
    return parts


def summed(parts: Float, token_slot: Int32, activation: Activation) -> Float:
    """`ExpertSum`: [N, H]."""
    total = np.zeros((len(token_slot), parts.shape[1]), np.float32)
    for slots in token_slot.T:
        total += parts[slots]
    return rounded(total, activation)


def up_decode(
    x: Float, logits: Float, gate_up_values: Int8, gate_up_scale: Float, experts: Experts, activation: Activation
) -> Float:
    """`ExpertUpDecode`: [N, E, I]; zeros for an expert that no token chose (kernels leave it as it was)."""
    hidden = np.zeros((len(x), experts.experts, experts.inner), np.float32)
    for expert in np.flatnonzero(chosen_experts(logits, experts.chosen).any(axis=0)):
        value = _products(x, gate_up_values[expert]).astype(np.float32) * gate_up_scale[expert]
        gate, linear = np.split(value, 2, axis=1)
        hidden[:, expert] = rounded(silu(gate) * linear, activation)
    return hidden


def down_decode(
    hidden: Float, logits: Float, down_values: Int8, down_scale: Float, experts: Experts, activation: Activation
) -> Float:
    """`ExpertDownDecode`: [N, H]."""
    weights = expert_weights(logits, experts)
    total = np.zeros((len(logits), experts.hidden), np.float32)
    for expert in range(experts.experts):
        value = _products(hidden[:, expert], down_values[expert]).astype(np.float32) * down_scale[expert]
        total += value * weights[:, expert, None]
    return rounded(total, activation)


def compute(
    operator: str, inputs: Sequence[npt.NDArray[Any]], experts: Experts, activation: Activation
) -> tuple[npt.NDArray[Any], ...]:
    """Outputs of an operator on its inputs, both in the order of its node."""
    match operator, list(inputs):
        case "ExpertRoute", [x, logits, input_scale]:
            return msgspec.structs.astuple(route(x, logits, input_scale, experts))
        case "ExpertUp", [x, values, scale, input_scale, hidden_scale, block_expert, slot_token]:
            return (up(x, values, scale, input_scale, hidden_scale, block_expert, slot_token, experts),)
        case "ExpertDown", [hidden, values, scale, hidden_scale, block_expert, slot_weight]:
            return (down(hidden, values, scale, hidden_scale, block_expert, slot_weight, experts, activation),)
        case "ExpertSum", [parts, token_slot]:
            return (summed(parts, token_slot, activation),)
        case "ExpertUpDecode", [x, logits, values, scale]:
            return (up_decode(x, logits, values, scale, experts, activation),)
        case "ExpertDownDecode", [hidden, logits, values, scale]:
            return (down_decode(hidden, logits, values, scale, experts, activation),)
    raise ValueError(f"{operator} with {len(inputs)} inputs")


def _slots_of(expert: int, block_expert: Int32, experts: Experts) -> npt.NDArray[np.int64]:
    """Slots of an expert's blocks."""
    return np.flatnonzero(np.repeat(block_expert == expert, experts.block_rows))


def _products(rows: npt.NDArray[np.generic], weights: Int8) -> Wide:
    """rows [..., width] times weights [out, width]; float64 holds the sums of int8 products exactly."""
    products: Wide = rows.astype(np.float64) @ weights.astype(np.float64).T
    return products
