"""Scaled dot-product attention over grouped heads, and the additive biases that say who sees whom."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.layers import Linear
from sonoedge.export.models.rope import rotate

# (q [B, S, heads, D] rotated, k [B, S, kv_heads, D] rotated, v [B, S, kv_heads, D]) -> [B, S, heads, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √D + bias) v, each key head serving heads / kv_heads query heads (arXiv 2305.13245).

    q [B, heads, S, D], k and v [B, kv_heads, T, D], bias [B or 1, 1, S, T] or None (all visible);
    gives [B, heads, S, D].
    """
    batch, heads, rows, width = q.shape
    kv_heads, columns = k.shape[1], k.shape[2]
    group = heads // kv_heads
    # Query heads of one group are stacked as rows, so keys and values need no copy a head.
    stacked = (q * width**-0.5).reshape(batch, kv_heads, group * rows, width)
    scores = torch.matmul(stacked, k.transpose(-1, -2))  # [B, kv_heads, group * S, T]
    if bias is not None:
        scores = scores.view(batch, kv_heads, group, rows, columns) + bias.unsqueeze(2)
    weights = functional.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    mixed = torch.matmul(weights.view(batch, kv_heads, group * rows, columns), v)
    return mixed.view(batch, heads, rows, width)


def visible_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive bias of a mask: 0 where `visible` (bool, any shape), half the lowest finite number elsewhere.

    Finite, also with a score added, so that a padding row that sees nothing gives numbers instead of NaN.
    """
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min / 2)


def causal_visible(rows: int, columns: int, device: torch.device) -> Tensor:
    """bool [1, 1, rows, columns]: the last `rows` of `columns` tokens each see themselves and what came before."""
    token = torch.arange(columns - rows, columns, device=device)  # [rows]
    seen = torch.arange(columns, device=device)  # [columns]
    return (seen[None, :] <= token[:, None])[None, None]


def padded_bias(attention_mask: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Causal bias [B, 1, rows, T] that also hides padding, attention_mask [B, T] being 0 at padding."""
    causal = causal_visible(rows, attention_mask.shape[1], attention_mask.device)
    return visible_bias(causal & attention_mask.bool()[:, None, None, :], dtype)


class SelfAttention(nn.Module):
    """Decoder attention without the attending: projects, rotates, calls `attend`, projects back.

    `attend` is passed in so that training, a KV cache and a graph export that emits another operator share this module.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=True)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=True)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=True)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x [B, S, hidden], cos and sin [B, S, D / 2]; gives [B, S, hidden]."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, heads, D]
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # [B, S, kv_heads, D]
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [B, S, 1, D / 2]
        mixed = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        result: Tensor = self.o_proj(mixed.flatten(-2))
        return result
