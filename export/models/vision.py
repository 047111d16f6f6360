"""The vision towers of Qwen2-VL and Qwen2.5-VL: patches in, merged image tokens of the decoder's width out."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.export.models.config import VisionConfig
from sonoedge.export.models.layers import Conv3d, Linear, RMSNorm, SwiGLU
from sonoedge.export.models.rope import rotate
from sonoedge.export.models.vision_reach import Reach, VisionAttend

NORM_EPS = 1e-6


def _norm(config: VisionConfig) -> nn.Module:
    """The normalisation of [..., embed_dim]: of layers in Qwen2-VL, root-mean-square in Qwen2.5-VL."""
    if config.windows is None:
        return nn.LayerNorm(config.embed_dim, eps=NORM_EPS)
    return RMSNorm(config.embed_dim, NORM_EPS)


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
    """Attention without the attending: projects, rotates, calls `attend`, projects back."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: VisionAttend) -> Tensor:
        """x [n, embed_dim], cos and sin [n, head_dim / 2]; gives [n, embed_dim]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [n, heads, head_dim]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        q, k = rotate(q.float(), cos, sin).to(x.dtype), rotate(k.float(), cos, sin).to(x.dtype)
        result: Tensor = self.proj(attend(q, k, v))
        return result


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
    """Pre-norm transformer block; its feed-forward is gated in Qwen2.5-VL."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = _norm(config)
        self.norm2 = _norm(config)
        self.attn = VisionAttention(config)
        gated = config.windows is not None
        self.mlp = SwiGLU(config.embed_dim, config.mlp_size, bias=True) if gated else VisionMlp(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: VisionAttend) -> Tensor:
        """x [n, embed_dim], cos and sin [n, head_dim / 2] to the new x."""
        x = x + self.attn(self.norm1(x), cos, sin, attend)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class PatchMerger(nn.Module):
    """Joins each block of merge x merge patches into one token of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = _norm(config)
        self.mlp = nn.Sequential(Linear(self.width, self.width), nn.GELU(), Linear(self.width, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, embed_dim] to [n / merge², hidden]."""
        result: Tensor = self.mlp(self.ln_q(x).view(-1, self.width))
        return result


class VisionTower(nn.Module):
    """Patches [n, patch_values] to image tokens [n / merge², hidden] (arXiv 2409.12191, 2502.13923)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(self, patches: Tensor, cos: Tensor, sin: Tensor, reach: Reach) -> Tensor:
        """cos and sin [n, head_dim / 2] from `vision_tables`; reach: which patches attend which."""
        x = self.patch_embed(patches)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, reach.of(index, self.config))
        merged: Tensor = self.merger(x)
        return merged
