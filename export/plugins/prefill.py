"""Prefill: tokens sorted by expert into blocks of one expert each, and int8 products of whole blocks (W8A8).

Each kernel writes every element of its outputs from one program in one order, without atomics, so results are the same
bits from run to run. Empty blocks are left as they are: nothing reads them.
"""

# Kernels are written in Triton's language, for which there are no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from sonoedge.export.plugins.routing import expert_weights


@triton.jit
def quantized(values, scale):
    """float32 to int8 as ONNX QuantizeLinear does: the quotient rounded half to even, saturating at -128 and 127."""
    steps = tl.minimum(tl.maximum(tl.math.div_rn(values, tl.zeros_like(values) + scale), -128.0), 127.0)
    # Beside 1.5 · 2^23 a float32 has no room for fractions, so that the sum itself rounds half to even.
    return (steps + 12582912.0 - 12582912.0).to(tl.int8)


@triton.jit
def place(program, blocks, columns: tl.constexpr, group: tl.constexpr):
    """Row block and column of a program: `group` row blocks share a read of a column's weights through the L2 cache."""
    in_group = group * columns
    first = (program // in_group) * group
    rows = tl.minimum(blocks - first, group)
    within = program % in_group
    return first + within % rows, within // rows


@triton.jit
def expert_route(
    x,
    logits,
    input_scale,
    tokens,
    x_int8,
    block_expert,
    slot_token,
    slot_weight,
    token_slot,
    experts: tl.constexpr,
    chosen: tl.constexpr,
    hidden: tl.constexpr,
    block_rows: tl.constexpr,
    norm_topk_prob: tl.constexpr,
    block_experts: tl.constexpr,
    block_tokens: tl.constexpr,
    block_values: tl.constexpr,
):
    """Program 0 gives every token its slots, the others quantize x [tokens, hidden]."""
    if tl.program_id(0) > 0:
        at = (tl.program_id(0) - 1) * block_values + tl.arange(0, block_values)
        inside = at < tokens * hidden
        values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_int8 + at, quantized(values, tl.load(input_scale)), mask=inside)
        return
    lanes = tl.arange(0, block_tokens)
    columns = tl.arange(0, block_experts)
    counts = tl.full([block_experts], 0, tl.int32)
    for start in range(0, tokens, block_tokens):
        rows = start + lanes
        taken, _ = expert_weights(logits, rows, rows < tokens, experts, chosen, norm_topk_prob, block_experts)
        counts += tl.sum(taken, axis=0)
    own_blocks = (counts + block_rows - 1) // block_rows
    end_block = tl.cumsum(own_blocks, axis=0)
    first_slot = (end_block - own_blocks) * block_rows
    blocks = (tokens * chosen + block_rows - 1) // block_rows + experts - 1
    for start in range(0, blocks, block_tokens):
        block = start + lanes
        passed = (block[:, None] >= end_block[None, :]) & (columns < experts)[None, :]
        tl.store(block_expert + block, tl.sum(passed.to(tl.int32), axis=1), mask=block < blocks)
    # Slots of no token are written apart from the others, so that no order between two writes matters.
    for start in range(0, blocks * block_rows, block_tokens):
        slot = start + lanes
        nth = slot[:, None] - first_slot[None, :]
        filled = tl.sum(((nth >= 0) & (nth < counts[None, :])).to(tl.int32), axis=1) > 0
        empty = (slot < blocks * block_rows) & (filled == 0)
        tl.store(slot_token + slot, tl.zeros_like(slot) + tokens, mask=empty)
        tl.store(slot_weight + slot, tl.full([block_tokens], 0.0, tl.float32), mask=empty)
    next_slot = first_slot
    for start in range(0, tokens, block_tokens):
        rows = start + lanes
        taken, weights = expert_weights(logits, rows, rows < tokens, experts, chosen, norm_topk_prob, block_experts)
        slot = next_slot[None, :] + tl.cumsum(taken, axis=0) - taken
        tl.store(slot_token + slot, tl.zeros_like(slot) + rows[:, None], mask=taken > 0)
        tl.store(slot_weight + slot, weights, mask=taken > 0)
        nth = tl.cumsum(taken, axis=1) - taken  # by index, which is the order of the sum
        tl.store(token_slot + rows[:, None] * chosen + nth, slot, mask=taken > 0)
        next_slot += tl.sum(taken, axis=0)


@triton.jit
def expert_up(
    x_int8,
    gate_up_values,
    gate_up_scale,
    input_scale,
    hidden_scale,
    block_expert,
    slot_token,
    tokens,
    inner_int8,
    experts: tl.constexpr,
    chosen: tl.constexpr,
    hidden: tl.constexpr,
    inner: tl.constexpr,
    block_rows: tl.constexpr,
    block_inner: tl.constexpr,
    block_k: tl.constexpr,
    group: tl.constexpr,
):
    """inner_int8 = quantized(silu(gate) · up) of one block [block_rows, block_inner]; rows of no token are zeros."""
    blocks = (tokens * chosen + block_rows - 1) // block_rows + experts - 1
    block, column = place(tl.program_id(0), blocks, (inner + block_inner - 1) // block_inner, group)
    expert = tl.load(block_expert + block)
    if expert >= experts:
        return
    even: tl.constexpr = hidden % block_k == 0
    slots = block * block_rows + tl.arange(0, block_rows)
    rows = tl.load(slot_token + slots)
    columns = column * block_inner + tl.arange(0, block_inner)
    k = tl.arange(0, block_k)
    x_at = x_int8 + rows[:, None] * hidden + k[None, :]
    weights = gate_up_values + expert.to(tl.int64) * (2 * inner * hidden)
    # Columns beyond the last wrap round: they read what is there, and are not stored.
    gate_at = weights + (columns % inner)[None, :] * hidden + k[:, None]
    up_at = gate_at + inner * hidden
    used = (rows < tokens)[:, None]
    gate = tl.full([block_rows, block_inner], 0, tl.int32)
    up = tl.full([block_rows, block_inner], 0, tl.int32)
    for start in range(0, hidden, block_k):
        if even:
            rows_k = tl.load(x_at + start, mask=used, other=0)
            gate_k = tl.load(gate_at + start)
            up_k = tl.load(up_at + start)
        else:
            inside = k < hidden - start
            rows_k = tl.load(x_at + start, mask=used & inside[None, :], other=0)
            gate_k = tl.load(gate_at + start, mask=inside[:, None], other=0)
            up_k = tl.load(up_at + start, mask=inside[:, None], other=0)
        gate = tl.dot(rows_k, gate_k, gate, out_dtype=tl.int32)
        up = tl.dot(rows_k, up_k, up, out_dtype=tl.int32)
    stored = columns < inner
    scale_at = gate_up_scale + expert * (2 * inner) + columns
    scale = tl.load(input_scale)
    gate_value = gate.to(tl.float32) * (scale * tl.load(scale_at, mask=stored, other=0.0))[None, :]
    up_value = up.to(tl.float32) * (scale * tl.load(scale_at + inner, mask=stored, other=0.0))[None, :]
    value = gate_value / (1.0 + tl.exp(-gate_value)) * up_value
    step = quantized(value, tl.load(hidden_scale + expert))
    tl.store(inner_int8 + slots[:, None] * inner + columns[None, :], step, mask=stored[None, :])


@triton.jit
def expert_down(
    inner_int8,
    down_values,
    down_scale,
    hidden_scale,
    block_expert,
    slot_weight,
    tokens,
    parts,
    experts: tl.constexpr,
    chosen: tl.constexpr,
    hidden: tl.constexpr,
    inner: tl.constexpr,
    block_rows: tl.constexpr,
    block_hidden: tl.constexpr,
    block_k: tl.constexpr,
    group: tl.constexpr,
):
    """parts = weight · down(inner_int8) of one block [block_rows, block_hidden]; rows of no token are zeros."""
    blocks = (tokens * chosen + block_rows - 1) // block_rows + experts - 1
    block, column = place(tl.program_id(0), blocks, (hidden + block_hidden - 1) // block_hidden, group)
    expert = tl.load(block_expert + block)
    if expert >= experts:
        return
    even: tl.constexpr = inner % block_k == 0
    slots = block * block_rows + tl.arange(0, block_rows)
    columns = column * block_hidden + tl.arange(0, block_hidden)
    k = tl.arange(0, block_k)
    rows_at = inner_int8 + slots[:, None] * inner + k[None, :]
    weights = down_values + expert.to(tl.int64) * (hidden * inner)
    down_at = weights + (columns % hidden)[None, :] * inner + k[:, None]
    total = tl.full([block_rows, block_hidden], 0, tl.int32)
    for start in range(0, inner, block_k):
        if even:
            rows_k = tl.load(rows_at + start)
            down_k = tl.load(down_at + start)
        else:
            inside = k < inner - start
            rows_k = tl.load(rows_at + start, mask=inside[None, :], other=0)
            down_k = tl.load(down_at + start, mask=inside[:, None], other=0)
        total = tl.dot(rows_k, down_k, total, out_dtype=tl.int32)
    stored = columns < hidden
    scale = tl.load(hidden_scale + expert) * tl.load(down_scale + expert * hidden + columns, mask=stored, other=0.0)
    value = total.to(tl.float32) * scale[None, :] * tl.load(slot_weight + slots)[:, None]
    part = value.to(parts.dtype.element_ty)
    tl.store(parts + slots[:, None] * hidden + columns[None, :], part, mask=stored[None, :])


@triton.jit
def expert_sum(parts, token_slot, tokens, y, chosen: tl.constexpr, hidden: tl.constexpr, block_hidden: tl.constexpr):
    """y = the parts of a token's experts, added in float32 in the order of their index."""
    token = tl.program_id(0)
    if token >= tokens:
        return
    columns = tl.program_id(1) * block_hidden + tl.arange(0, block_hidden)
    stored = columns < hidden
    total = tl.full([block_hidden], 0.0, tl.float32)
    for nth in tl.static_range(chosen):
        slot = tl.load(token_slot + token * chosen + nth)
        total += tl.load(parts + slot * hidden + columns, mask=stored, other=0.0).to(tl.float32)
    tl.store(y + token * hidden + columns, total.to(y.dtype.element_ty), mask=stored)
