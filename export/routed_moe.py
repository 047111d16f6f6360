"""EchoVLM's mixture of experts computed expert by expert, each on the tokens routed to it and on no others."""

import torch
from torch import Tensor

from sonoedge.export.models.moe import SparseMoE


class RoutedMoE(SparseMoE):
    """Same weights and result as `SparseMoE` without joining the experts' weights; its shapes depend on the data."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed output [..., hidden] and the router logits [..., experts]."""
        router_logits = self.gate(x)
        tokens = x.flatten(0, -2)  # [tokens, hidden]
        weights = self.route(router_logits).to(x.dtype).flatten(0, -2)  # [tokens, experts]
        routed = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            chosen = weights[:, index].nonzero().squeeze(1)  # [routed]
            if chosen.numel():
                routed.index_add_(0, chosen, expert(tokens[chosen]) * weights[chosen, index, None])
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return routed.view_as(x) + shared, router_logits
