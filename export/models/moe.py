"""EchoVLM's mixture of experts: every expert computed densely, which gives exactly what sparse routing gives."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.export.models.config import MoEConfig
from sonoedge.export.models.layers import Linear, SwiGLU


class SparseMoE(nn.Module):
    """Top-k routed experts plus a gated shared expert, as in Qwen2-MoE (arXiv 2407.10671, section 2.2.2).

    All experts run as one wide matrix product and experts that a token did not choose are weighted zero, so no shape
    depends on the data: quick in training, and a graph export sees plain products.
    """

    def __init__(self, hidden: int, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(hidden, config.num_experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(hidden, config.moe_intermediate_size) for _ in range(config.num_experts))
        self.shared_expert = SwiGLU(hidden, config.shared_expert_intermediate_size)
        self.shared_expert_gate = Linear(hidden, 1, bias=False)

    def route(self, router_logits: Tensor) -> Tensor:
        """Weight of every expert, zero for those not chosen; router_logits [..., experts] to float32 [..., experts]."""
        probabilities = functional.softmax(router_logits, dim=-1, dtype=torch.float32)
        chosen, index = torch.topk(probabilities, self.config.num_experts_per_tok, dim=-1)  # [..., k]
        if self.config.norm_topk_prob:
            chosen = chosen / chosen.sum(dim=-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, index, chosen)

    def expert_hidden(self, x: Tensor) -> Tensor:
        """Input of each expert's down projection, x [..., hidden] to [..., experts, intermediate]."""
        gate = functional.linear(x, torch.cat(self._weights("gate_proj")))  # [..., experts * intermediate]
        up = functional.linear(x, torch.cat(self._weights("up_proj")))
        hidden = functional.silu(gate) * up
        split: Tensor = hidden.unflatten(-1, (self.config.num_experts, self.config.moe_intermediate_size))
        return split

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixed output [..., hidden] and the router logits [..., experts]."""
        router_logits = self.gate(x)
        weights = self.route(router_logits).to(x.dtype)
        hidden = self.expert_hidden(x) * weights.unsqueeze(-1)
        routed = functional.linear(hidden.flatten(-2), torch.cat(self._weights("down_proj"), dim=1))
        shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return routed + shared, router_logits

    def _weights(self, name: str) -> list[Tensor]:
        return [expert.get_submodule(name).get_parameter("weight") for expert in self.experts]
