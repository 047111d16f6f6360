"""The building blocks that the parts of the model share: layers that start at zero, RMS normalisation, SwiGLU."""

import torch
from torch import Tensor, nn
from torch.nn import functional


# Weights always come from a checkpoint or from `init_model`. PyTorch's own random initialisation would be thrown away,
# and on meta weights it alone costs two seconds of imports.
class Linear(nn.Linear):
    """nn.Linear that starts at zero."""

    def reset_parameters(self) -> None:
        _zero(self)


class Embedding(nn.Embedding):
    """nn.Embedding that starts at zero."""

    def reset_parameters(self) -> None:
        _zero(self)


class Conv3d(nn.Conv3d):
    """nn.Conv3d that starts at zero."""

    def reset_parameters(self) -> None:
        _zero(self)


def _zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.zero_()


class RMSNorm(nn.Module):
    """Root-mean-square normalisation computed in float32, x [..., width] to the same shape (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SwiGLU(nn.Module):
    """Feed-forward down(silu(gate(x)) * up(x)), x [..., hidden] to the same shape (arXiv 2002.05202)."""

    def __init__(self, hidden: int, intermediate: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate, bias=bias)
        self.up_proj = Linear(hidden, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = functional.silu(self.gate_proj(x)) * self.up_proj(x)  # [..., intermediate]
        result: Tensor = self.down_proj(hidden)
        return result
