"""Which experts a token takes, and at what weight: the helper that every kernel which routes is compiled with.

A token takes the `chosen` experts with the largest logits, of equal ones those with the lower index. Softmax never
turns the order of two logits round, so this is the choice by probabilities; and logits, unlike probabilities, are the
same bits wherever they are compared. A logit that is not a number counts as the largest: the choice stays one of
`chosen` experts, no memory is touched that is not a token's own, and weights that are no numbers say what happened.
"""

# Kernels are written in Triton's language, for which there are no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sortable(logits):
    """Logits in an order that is total."""
    return tl.where(logits == logits, logits, float("inf"))


@triton.jit
def takes_expert(logits, rows, used, expert, experts: tl.constexpr, chosen: tl.constexpr, block_experts: tl.constexpr):
    """Whether each token takes one expert: rows int32 [tokens], used bool [tokens], to bool [tokens]."""
    columns = tl.arange(0, block_experts)
    valid = used[:, None] & (columns < experts)[None, :]
    theirs = sortable(tl.load(logits + rows[:, None] * experts + columns[None, :], mask=valid, other=-float("inf")))
    own = sortable(tl.load(logits + rows * experts + expert, mask=used, other=0.0))[:, None]
    before = (theirs > own) | ((theirs == own) & (columns < expert)[None, :])
    return used & (tl.sum((before & valid).to(tl.int32), axis=1) < chosen)


@triton.jit
def expert_weights(
    logits,
    rows,
    used,
    experts: tl.constexpr,
    chosen: tl.constexpr,
    norm_topk_prob: tl.constexpr,
    block_experts: tl.constexpr,
):
    """Choice int32 and weight float32, each [tokens, block_experts]: 0 for experts not taken and for rows not used."""
    columns = tl.arange(0, block_experts)
    valid = used[:, None] & (columns < experts)[None, :]
    values = tl.load(logits + rows[:, None] * experts + columns[None, :], mask=valid, other=-float("inf"))
    keys = sortable(values)
    rank = tl.full(keys.shape, 0, tl.int32)
    for other in range(experts):
        theirs = sortable(tl.load(logits + rows * experts + other, mask=used, other=0.0))[:, None]
        rank += ((theirs > keys) | ((theirs == keys) & (other < columns)[None, :])).to(tl.int32)
    taken = valid & (rank < chosen)
    # Rows not used would subtract one infinity from another.
    largest = tl.where(used, tl.max(values, axis=1), 0.0)[:, None]
    shares = tl.exp(values - largest)  # 0 in the columns beyond the experts
    counted = tl.where(taken, shares, 0.0) if norm_topk_prob else shares
    total = tl.where(used, tl.sum(counted, axis=1), 1.0)[:, None]
    return taken.to(tl.int32), tl.where(taken, shares / total, 0.0)
