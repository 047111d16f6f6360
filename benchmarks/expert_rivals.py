"""What the expert kernels are measured against: the reference's loop over experts, and all experts densely."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.expert_layers import Buffers
from benchmarks.gpu_clock import int8_product
from sonoedge.export.plugins.dispatch import Experts


def bfloat16_weights(layer: Buffers) -> Buffers:
    """gate [E, I, H], up [E, I, H] and down [H, E · I] of a layer as bfloat16."""
    gate_up = (layer["gate_up_values"] * layer["gate_up_scale"][..., None]).bfloat16()
    gate, up = gate_up.chunk(2, dim=1)
    down = (layer["down_values"] * layer["down_scale"][..., None]).bfloat16()
    return {"gate": gate.contiguous(), "up": up.contiguous(), "down": down.transpose(0, 1).flatten(1)}


def weights_of(logits: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Weights float32 and indices of the chosen experts, each [tokens, chosen]."""
    chosen, index = functional.softmax(logits, dim=-1).topk(experts.chosen, dim=-1)
    return (chosen / chosen.sum(dim=-1, keepdim=True) if experts.norm_topk_prob else chosen), index


def loop_over_experts(x: Tensor, logits: Tensor, weights: Buffers, experts: Experts) -> Tensor:
    """Each expert on its own tokens, as EchoVLM's reference code does; its shapes depend on the data."""
    shares, index = weights_of(logits, experts)
    shares = shares.to(x.dtype)
    total = torch.zeros_like(x)
    for expert in range(experts.experts):
        rows, nth = torch.where(index == expert)
        own = x[rows]
        gate, up = weights["gate"][expert], weights["up"][expert]
        hidden = functional.silu(functional.linear(own, gate)) * functional.linear(own, up)
        down = weights["down"][:, expert * experts.inner : (expert + 1) * experts.inner]
        part = functional.linear(hidden, down) * shares[rows, nth, None]
        total.index_add_(0, rows, part)
    return total


def all_experts(x: Tensor, logits: Tensor, weights: Buffers, experts: Experts) -> Tensor:
    """Every expert on every token as three products of the vendor's library, those not chosen weighted zero."""
    shares, index = weights_of(logits, experts)
    spread = torch.zeros_like(logits).scatter(1, index, shares).to(x.dtype)  # [tokens, experts]
    gate = functional.linear(x, weights["gate"].flatten(0, 1))  # [tokens, experts · inner]
    up = functional.linear(x, weights["up"].flatten(0, 1))
    hidden = (functional.silu(gate) * up).unflatten(1, (experts.experts, -1)) * spread[..., None]
    return functional.linear(hidden.flatten(1), weights["down"])


def int8_products(x_int8: Tensor, inner_int8: Tensor, layer: Buffers, experts: Experts) -> None:
    """The int8 products alone of all experts on every token, without scales, SiLU or a sum: a bound for dense int8.

    x_int8 [tokens, hidden], inner_int8 [tokens, inner].
    """
    int8_product(x_int8, layer["gate_up_values"].flatten(0, 1).t())
    for expert in range(experts.experts):
        int8_product(inner_int8, layer["down_values"][expert].t())
