"""The Qwen2-VL vision tower: patches in, merged image tokens of the decoder's width out."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.export.models.attention import attention
from sonoedge.export.models.config import VisionConfig
from sonoedge.export.models.layers import Conv3d, Linear
from sonoedge.export.models.rope import rotate

NORM_EPS = 1e-6


class PatchEmbed(nn.Module):
    """The checkpoint's 3-D convolution, whose stride is its kernel, applied as one matrix product on flat patches."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = Conv3d(config.in_channels, config.embed_dim, kernel_size=kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """patches [n, patch_values] to [n, embed_dim]."""
        weight = self.proj.weight
        return functional.linear(patches.to(weight.dtype), weight.flatten(1))


class VisionAttention(nn.Module):
    """Full attention within each segment (one frame of one image)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Sequence[int] | None) -> Tensor:
        """x [n, embed_dim], cos and sin [n, head_dim / 2], segments: patches in each (None: one segment)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [n, heads, head_dim]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = rotate(q.float(), cos, sin).to(x.dtype), rotate(k.float(), cos, sin).to(x.dtype)
        if segments is None or len(set(segments)) == 1:
            count = 1 if segments is None else len(segments)
            mixed = _attend(q, k, v, count)
        else:
            sizes = list(segments)
            split = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
            mixed = torch.cat([_attend(*qkv, 1) for qkv in split])
        result: Tensor = self.proj(mixed)
        return result


def _attend(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Attention in `count` segments of equal size; q, k, v [n, heads, head_dim] to [n, embed_dim]."""
    q, k, v = (part.unflatten(0, (count, -1)).transpose(1, 2) for part in (q, k, v))  # [count, heads, n / count, D]
    return attention(q, k, v, None).transpose(1, 2).flatten(0, 1).flatten(1)


class VisionMlp(nn.Module):
    """Feed-forward with the sigmoid approximation of GELU ("quick GELU")."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.embed_dim, config.mlp_size)
        self.fc2 = Linear(config.mlp_size, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        result: Tensor = self.fc2(hidden * torch.sigmoid(1.702 * hidden))
        return result


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.attn = VisionAttention(config)
        self.mlp = VisionMlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Sequence[int] | None) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, segments)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class PatchMerger(nn.Module):
    """Joins each block of merge x merge patches into one token of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
        self.mlp = nn.Sequential(Linear(self.width, self.width), nn.GELU(), Linear(self.width, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, embed_dim] to [n / merge², hidden]."""
        result: Tensor = self.mlp(self.ln_q(x).view(-1, self.width))
        return result


class VisionTower(nn.Module):
    """Patches [n, patch_values] to image tokens [n / merge², hidden] (Qwen2-VL, arXiv 2409.12191)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor, segments: Sequence[int] | None = None) -> Tensor:
        """cos and sin [n, head_dim / 2] from `vision_tables`; segments: patches that attend together (None: all)."""
        x = self.patch_embed(patches)
        for block in self.blocks:
            x = block(x, cos, sin, segments)
        merged: Tensor = self.merger(x)
        return merged
