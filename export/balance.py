"""The load-balance loss that keeps all experts in use (Switch Transformer, arXiv 2101.03961, equation 4, for top k)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """1 when tokens spread evenly over the experts, up to E / k when they crowd; router_logits: of layers, [..., E]."""
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        probability = functional.softmax(logits.reshape(-1, experts), dim=-1)  # [tokens, experts]
        chosen = torch.zeros_like(probability).scatter(1, probability.topk(top_k, dim=1).indices, 1.0)
        losses.append(experts * (chosen.mean(0) / top_k * probability.mean(0)).sum())
    return torch.stack(losses).mean()
