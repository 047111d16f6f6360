"""Marks in an exported graph: every product that a recipe may quantize leaves torch as one node that carries its name.

A node `sonoedge::Linear` or `sonoedge::Experts` means what the torch module means; `export.lowering` rewrites each into
standard operators, quantized or not. So a scheme is chosen by name, never by matching patterns.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.layers import RMSNorm
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.models.vision import PatchEmbed

DOMAIN = "sonoedge"
LM_HEAD = "lm_head"
# A few columns each: routing stays exact, and costs nothing.
FLOAT_LINEARS = ("moe.gate", "shared_expert_gate", "coefficient")


def linear_mark(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A product x [..., in] · weightᵀ [out, in] + bias, as one node called `name`."""
    inputs = (x, weight) if bias is None else (x, weight, bias)
    marked: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Linear", inputs, {"name": name}, dtype=x.dtype, shape=[*x.shape[:-1], weight.shape[0]], version=1
    )
    return marked


class MarkedLinear(nn.Module):
    """Stands in for a linear layer in an export."""

    def __init__(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.name, self.weight, self.bias = name, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return linear_mark(self.name, x, self.weight, self.bias)


class MarkedPatchEmbed(nn.Module):
    """Stands in for the patch embedding: a linear layer over flat patches."""

    def __init__(self, name: str, proj: nn.Conv3d) -> None:
        super().__init__()
        self.name, self.weight = name, nn.Parameter(proj.weight.detach().flatten(1))

    def forward(self, patches: Tensor) -> Tensor:
        return linear_mark(self.name, patches, self.weight, None)


class MarkedMoE(nn.Module):
    """Stands in for the mixture: routing as standard operators, all experts as one `sonoedge::Experts` node."""

    def __init__(self, name: str, moe: SparseMoE) -> None:
        super().__init__()
        self.name, self.moe = name, moe
        self.layer = int(name.split(".")[2])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        router_logits = self.moe.gate(x)
        router_logits = probe_mark(f"probe.router.{self.layer}", router_logits)
        weights = self.moe.route(router_logits).to(x.dtype)  # [..., experts]
        projections = [getattr(e, p).weight for e in self.moe.experts for p in ("gate_proj", "up_proj", "down_proj")]
        inputs = (x, weights, *projections)
        routed: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Experts", inputs, {"name": self.name}, dtype=x.dtype, shape=x.shape, version=1
        )
        shared = torch.sigmoid(self.moe.shared_expert_gate(x)) * self.moe.shared_expert(x)
        return routed + shared, router_logits


class MarkedEmbedding(nn.Module):
    """Stands in for the token embeddings, which may be stored as int8 rows."""

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self.name, self.weight = name, weight

    def forward(self, ids: Tensor) -> Tensor:
        embedded: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Embedding",
            (ids, self.weight),
            {"name": self.name},
            dtype=self.weight.dtype,
            shape=[*ids.shape, self.weight.shape[1]],
            version=1,
        )
        return embedded


class MarkedRMSNorm(nn.Module):
    """Stands in for a root-mean-square normalisation, for which backends have an operator of their own."""

    def __init__(self, name: str, norm: RMSNorm) -> None:
        super().__init__()
        self.name, self.weight, self.eps = name, norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::RMSNorm",
            (x, self.weight),
            {"name": self.name, "epsilon": self.eps},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
        return normed


def probe_mark(name: str, x: Tensor) -> Tensor:
    """x under a name that a measurement can ask for."""
    seen: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::Probe", (x,), {"name": name}, dtype=x.dtype, shape=x.shape, version=1
    )
    return seen


def checkpoint_key(parameter: str) -> str:
    """The checkpoint's key of a parameter of an exported graph."""
    name = parameter.replace(".moe.moe.", ".moe.")
    if name.startswith("tower."):
        return f"visual.{name.removeprefix('tower.')}".replace("patch_embed.weight", "patch_embed.proj.weight")
    return name.removeprefix("model.")


def marked(model: EchoVLM) -> EchoVLM:
    """A copy of `model` (weights shared) whose products leave an export as named nodes."""
    shared = {id(tensor): tensor for tensor in model.parameters()}
    twin = copy.deepcopy(model, memo=dict(shared))
    for name, module in list(twin.named_modules()):
        if isinstance(module, SparseMoE):
            _replace(twin, name, MarkedMoE(f"{name}.experts", module))
        elif isinstance(module, PatchEmbed):
            _replace(twin, name, MarkedPatchEmbed(f"{name}.proj", module.proj))
        elif isinstance(module, RMSNorm):
            _replace(twin, name, MarkedRMSNorm(name, module))
    embeddings = MarkedEmbedding("model.embed_tokens", twin.model.embed_tokens.weight)
    _replace(twin, "model.embed_tokens", embeddings)
    for name, module in list(twin.named_modules()):
        clean = name.replace(".moe.moe.", ".moe.")
        if is_product(clean, module):
            assert isinstance(module, nn.Linear)
            _replace(twin, name, MarkedLinear(clean, module.weight, module.bias))
    return twin


def is_product(name: str, module: nn.Module) -> bool:
    """Whether the module of that name is a linear layer that a recipe may name: not an expert's, nor the head."""
    return (
        isinstance(module, nn.Linear)
        and ".experts." not in name
        and not name.endswith(FLOAT_LINEARS)
        and name != LM_HEAD
    )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
