"""Decode: up to eight tokens, bound by the reading of weights, of which each chosen expert's are read once (W8A16).

Every program works the routing out again from the logits, which costs less than a launch. Programs of an expert that no
token takes end before they read a weight. Sums have one order, without atomics: the same bits from run to run.

splits = 0, for one token: rows of weights times the token, lane by lane. splits > 0: matrix units, whose instructions
hold eight tokens; each warp takes one part of the depth, for there are too few rows to divide. Those units cut float32
off, so float32 activations go in as sums of what they hold (tf32x3).
"""

# Kernels are written in Triton's language, for which there are no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from sonoedge.export.plugins.routing import expert_weights, takes_expert

# Four int8 to float16 in a handful of instructions, where conversions take one slow one each: bytes of w + 128 become
# the low bytes of 1024 + (w + 128), and 1152 is subtracted; every step is exact.
INT8_TO_FLOAT16 = tl.constexpr(
    """{
    .reg .b32 t, c;
    mov.b32 c, 0x64806480;
    xor.b32 t, $2, 0x80808080;
    prmt.b32 $0, t, 0x64646464, 0x4140;
    prmt.b32 $1, t, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, c;
    sub.f16x2 $1, $1, c;
    }"""
)


@triton.jit
def widened(weights):
    """int8 as float32: bytes of w + 128 become the low bytes of 2^23 + (w + 128), which is subtracted."""
    bits = weights.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def as_activation(weights, kind: tl.constexpr):
    """int8 as the type of activations, which holds every one of them."""
    if kind == tl.float32:
        return widened(weights)
    if kind == tl.float16:
        return tl.inline_asm_elementwise(INT8_TO_FLOAT16, "=r,=r,r", [weights], dtype=tl.float16, is_pure=True, pack=4)
    return weights.to(kind)


@triton.jit
def expert_up_decode(
    x,
    logits,
    gate_up_values,
    gate_up_scale,
    tokens,
    inner_float,
    experts: tl.constexpr,
    chosen: tl.constexpr,
    hidden: tl.constexpr,
    inner: tl.constexpr,
    block_experts: tl.constexpr,
    block_tokens: tl.constexpr,
    block_inner: tl.constexpr,
    block_k: tl.constexpr,
    splits: tl.constexpr,
):
    """inner_float [tokens, experts, inner] = silu(gate) · up for the experts that some token takes."""
    expert = tl.program_id(1)
    rows = tl.arange(0, block_tokens)
    used = rows < tokens
    takes = takes_expert(logits, rows, used, expert, experts, chosen, block_experts)
    if tl.sum(takes.to(tl.int32), axis=0) == 0:
        return
    columns = tl.program_id(0) * block_inner + tl.arange(0, block_inner)
    weights = gate_up_values + expert.to(tl.int64) * (2 * inner * hidden)
    # Rows beyond the last wrap round: they read what is there, and are not stored.
    if splits == 0:
        # Every lane loads its own part of x, so that no iteration waits for another warp.
        at = (columns % inner)[:, None] * hidden + tl.arange(0, block_k)[None, :]
        x_at = x + tl.zeros_like(columns)[:, None] + tl.arange(0, block_k)[None, :]
        gates = tl.full([block_inner, block_k], 0.0, tl.float32)
        ups = tl.full([block_inner, block_k], 0.0, tl.float32)
        for start in range(0, hidden, block_k):
            inside = tl.broadcast_to((tl.arange(0, block_k) < hidden - start)[None, :], [block_inner, block_k])
            gate_k = tl.load(weights + start + at, mask=inside, other=0)
            up_k = tl.load(weights + inner * hidden + start + at, mask=inside, other=0)
            x_k = tl.load(x_at + start, mask=inside, other=0.0).to(tl.float32)
            gates += widened(gate_k) * x_k
            ups += widened(up_k) * x_k
        gate = tl.sum(gates, axis=1)[:, None]  # [block_inner, 1]
        up = tl.sum(ups, axis=1)[:, None]
    else:
        depth: tl.constexpr = block_k // splits
        k = tl.arange(0, splits)[:, None] * depth + tl.arange(0, depth)[None, :]  # [splits, depth]
        at = (columns % inner)[None, :, None] * hidden + k[:, None, :]
        x_at = x + (rows * hidden)[None, None, :] + k[:, :, None]
        gates = tl.full([splits, block_inner, block_tokens], 0.0, tl.float32)
        ups = tl.full([splits, block_inner, block_tokens], 0.0, tl.float32)
        for start in range(0, hidden, block_k):
            inside = k < hidden - start
            gate_k = tl.load(weights + start + at, mask=inside[:, None, :], other=0)
            up_k = tl.load(weights + inner * hidden + start + at, mask=inside[:, None, :], other=0)
            x_k = tl.load(x_at + start, mask=used[None, None, :] & inside[:, :, None], other=0.0)
            gates = tl.dot(as_activation(gate_k, x.dtype.element_ty), x_k, gates, input_precision="tf32x3")
            ups = tl.dot(as_activation(up_k, x.dtype.element_ty), x_k, ups, input_precision="tf32x3")
        gate = tl.sum(gates, axis=0)  # [block_inner, block_tokens]
        up = tl.sum(ups, axis=0)
    stored = columns < inner
    scale_at = gate_up_scale + expert * (2 * inner) + columns
    gate = gate * tl.load(scale_at, mask=stored, other=0.0)[:, None]
    up = up * tl.load(scale_at + inner, mask=stored, other=0.0)[:, None]
    value = gate / (1.0 + tl.exp(-gate)) * up
    at = inner_float + rows[None, :] * (experts * inner) + expert * inner + columns[:, None]
    tl.store(at, value.to(inner_float.dtype.element_ty), mask=stored[:, None] & used[None, :])


@triton.jit
def expert_down_decode(
    inner_float,
    logits,
    down_values,
    down_scale,
    tokens,
    y,
    experts: tl.constexpr,
    chosen: tl.constexpr,
    hidden: tl.constexpr,
    inner: tl.constexpr,
    norm_topk_prob: tl.constexpr,
    block_experts: tl.constexpr,
    block_tokens: tl.constexpr,
    block_hidden: tl.constexpr,
    block_k: tl.constexpr,
    splits: tl.constexpr,
):
    """y [tokens, hidden] = the sum of weight · down(inner_float), experts in the order of their index."""
    rows = tl.arange(0, block_tokens)
    used = rows < tokens
    taken, shares = expert_weights(logits, rows, used, experts, chosen, norm_topk_prob, block_experts)
    experts_at = tl.arange(0, block_experts)
    takers = tl.sum(taken, axis=0)  # [block_experts]
    columns = tl.program_id(0) * block_hidden + tl.arange(0, block_hidden)
    stored = columns < hidden
    weights = down_values
    total = tl.full([block_hidden, block_tokens], 0.0, tl.float32)
    for expert in range(experts):
        if tl.sum(tl.where(experts_at == expert, takers, 0), axis=0) > 0:
            share = tl.sum(tl.where((experts_at == expert)[None, :], shares, 0.0), axis=1)  # [block_tokens]
            if splits == 0:
                at = (columns % hidden)[:, None] * inner + tl.arange(0, block_k)[None, :]
                inner_at = inner_float + tl.zeros_like(columns)[:, None] + tl.arange(0, block_k)[None, :]
                downs = tl.full([block_hidden, block_k], 0.0, tl.float32)
                for start in range(0, inner, block_k):
                    inside = tl.broadcast_to((tl.arange(0, block_k) < inner - start)[None, :], [block_hidden, block_k])
                    down_k = tl.load(weights + start + at, mask=inside, other=0)
                    inner_k = tl.load(inner_at + expert * inner + start, mask=inside, other=0.0).to(tl.float32)
                    downs += widened(down_k) * inner_k
                down = tl.sum(downs, axis=1)[:, None]  # [block_hidden, 1]
            else:
                depth: tl.constexpr = block_k // splits
                k = tl.arange(0, splits)[:, None] * depth + tl.arange(0, depth)[None, :]  # [splits, depth]
                at = (columns % hidden)[None, :, None] * inner + k[:, None, :]
                inner_at = inner_float + (rows * (experts * inner))[None, None, :] + k[:, :, None]
                downs = tl.full([splits, block_hidden, block_tokens], 0.0, tl.float32)
                for start in range(0, inner, block_k):
                    inside = k < inner - start
                    down_k = tl.load(weights + start + at, mask=inside[:, None, :], other=0)
                    mask = used[None, None, :] & inside[:, :, None]
                    inner_k = tl.load(inner_at + expert * inner + start, mask=mask, other=0.0)
                    weights_k = as_activation(down_k, inner_float.dtype.element_ty)
                    downs = tl.dot(weights_k, inner_k, downs, input_precision="tf32x3")
                down = tl.sum(downs, axis=0)  # [block_hidden, block_tokens]
            scale = tl.load(down_scale + expert * hidden + columns, mask=stored, other=0.0)
            # A token that does not take the expert adds nothing, whatever lies in its row.
            total += tl.where(share[None, :] != 0.0, down * scale[:, None] * share[None, :], 0.0)
        weights += hidden * inner
    at = y + rows[None, :] * hidden + columns[:, None]
    tl.store(at, total.to(y.dtype.element_ty), mask=stored[:, None] & used[None, :])
