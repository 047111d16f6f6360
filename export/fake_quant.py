"""The float torch model computing as its INT8 graphs do: every product rounds its weights and inputs as the plan says.

Rounding has a straight-through gradient (arXiv 1308.3432): as if it were not there, and zero for values that saturate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.export.layout import EMBEDDING
from sonoedge.export.models.attention import Attend, SelfAttention
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.models.vision import PatchEmbed
from sonoedge.export.quantize import products
from sonoedge.export.scheme import INT8_MAX, CacheScheme, QuantizationPlan, Scheme

LOWEST = -128  # QuantizeLinear saturates here; a scale from the largest value itself never reaches it
SMALLEST = torch.finfo(torch.float32).tiny

Round = Callable[[Tensor], Tensor]
Weight = Callable[[], Tensor]


@contextmanager
def fake_quantized(model: EchoVLM, plan: QuantizationPlan, *, straight_through: bool = False) -> Iterator[None]:
    """Inside, the float32 `model` computes every product and its KV cache in the schemes of `plan`; its weights stay.

    straight_through: weights are rounded again in every pass and gradients reach them, for training; else once, on
    entry. Raises SonoEdgeError naming the product or cache that calibration never saw.
    """
    linears, mixtures = products(model)
    with ExitStack() as overrides:
        for name, module in linears.items():
            assert isinstance(module, PatchEmbed | nn.Linear)
            if plan.schemes[name] is not Scheme.FLOAT:
                product = _linear(name, module, plan, straight_through)
                overrides.enter_context(_override(module, "forward", product))
        for name, module in mixtures.items():
            assert isinstance(module, SparseMoE)
            if plan.schemes[name] is not Scheme.FLOAT:
                overrides.enter_context(_override(module, "forward", _experts(name, module, plan, straight_through)))
        if plan.schemes["lm_head"] is not Scheme.FLOAT:
            overrides.enter_context(_override(model, "project", _head(model, plan, straight_through)))
        if plan.schemes.get(EMBEDDING, Scheme.FLOAT) is not Scheme.FLOAT:
            rows = _weight(lambda: model.model.embed_tokens.weight, plan.schemes[EMBEDDING], straight_through)
            lookup = _override(model.model.embed_tokens, "forward", lambda ids: functional.embedding(ids, rows()))
            overrides.enter_context(lookup)
        if plan.cache is CacheScheme.INT8:
            for name, module in model.named_modules():
                if isinstance(module, SelfAttention):
                    handle = module.register_forward_pre_hook(_int8_cache(name, plan))
                    overrides.callback(handle.remove)
        yield


def fake_quantized_weight(weight: Tensor, block: int | None = None) -> Tensor:
    """float32 weight [out, in] through int8 and back, bit for bit as `quantize_weight`; one scale a row, or a block."""
    if block is None:
        return round_rows(weight)
    parts = [round_rows(part) for part in weight.split(block, dim=1)]  # the last may be short
    return torch.cat(parts, dim=1)


def round_rows(x: Tensor) -> Tensor:
    """x [..., width] through int8 and back, each row with the scale of its own largest value; zeros stay zeros."""
    scale = (x.detach().abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp(min=SMALLEST)  # [..., 1]
    return round_to(x, scale)


def round_to(x: Tensor, scale: Tensor) -> Tensor:
    """x through int8 and back with a given scale (broadcast over x), half to even, saturating at -128 and 127."""
    rounded: Tensor = _StraightThrough.apply(x, scale)  # type: ignore[no-untyped-call]  # torch types it so
    return rounded


class _StraightThrough(torch.autograd.Function):
    """The gradient passes where the value was in range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:  # torch types its context as Any
        levels = torch.round(x / scale)
        ctx.save_for_backward((levels >= LOWEST) & (levels <= INT8_MAX))
        return levels.clamp_(LOWEST, INT8_MAX).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (in_range,) = ctx.saved_tensors
        return gradients[0] * in_range, None


def _input_round(plan: QuantizationPlan, name: str, *ranges: str) -> Round:
    """How an input of product `name` is rounded; several ranges: one for each row of the axis before the last."""
    scheme = plan.schemes[name]
    if scheme is Scheme.W8A8_DYNAMIC:
        return round_rows
    if scheme is not Scheme.W8A8:
        return lambda x: x
    # A tensor, not a Python number: divisors of one element are exact on every device.
    scale = torch.tensor([[plan.activation_scale(each)] for each in ranges])  # [rows, 1]
    return lambda x: round_to(x, scale.to(x.device))


def _weight(read: Weight, scheme: Scheme, straight_through: bool) -> Weight:
    """The rounded weight: of every moment when training, else of now."""
    if straight_through:
        return lambda: fake_quantized_weight(read(), scheme.block)
    with torch.no_grad():
        rounded = fake_quantized_weight(read(), scheme.block)
    return lambda: rounded


def _linear(
    name: str, module: PatchEmbed | nn.Linear, plan: QuantizationPlan, straight_through: bool
) -> Callable[[Tensor], Tensor]:
    scheme = plan.schemes[name]
    linear = module.proj if isinstance(module, PatchEmbed) else module
    weight = _weight(lambda: linear.weight.flatten(1), scheme, straight_through)  # [out, in]
    round_input = _input_round(plan, name, name)
    return lambda x: functional.linear(round_input(x), weight(), linear.bias)


def _head(model: EchoVLM, plan: QuantizationPlan, straight_through: bool) -> Callable[[Tensor], Tensor]:
    scheme = plan.schemes["lm_head"]
    owner = model.model.embed_tokens if model.config.tie_word_embeddings else model.lm_head
    weight = _weight(lambda: owner.weight, scheme, straight_through)
    round_input = _input_round(plan, "lm_head", "lm_head")
    return lambda hidden: functional.linear(round_input(hidden), weight())


def _experts(
    name: str, moe: SparseMoE, plan: QuantizationPlan, straight_through: bool
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    scheme = plan.schemes[name]
    count = moe.config.num_experts

    def weights(part: str, axis: int) -> Weight:
        linears = [expert.get_submodule(part) for expert in moe.experts]
        each = [_weight(partial(linear.get_parameter, "weight"), scheme, straight_through) for linear in linears]
        return lambda: torch.cat([weight() for weight in each], dim=axis)

    gate, up, down = weights("gate_proj", 0), weights("up_proj", 0), weights("down_proj", 1)
    round_input = _input_round(plan, name, name)
    round_hidden = _input_round(plan, name, *(f"{name}.{expert}.down_proj" for expert in range(count)))

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        router_logits = moe.gate(x)
        shares = moe.route(router_logits).to(x.dtype)  # [..., experts]
        rounded = round_input(x)
        hidden = functional.silu(functional.linear(rounded, gate())) * functional.linear(rounded, up())
        hidden = round_hidden(hidden.unflatten(-1, (count, -1))) * shares.unsqueeze(-1)  # [..., experts, intermediate]
        routed = functional.linear(hidden.flatten(-2), down())
        shared = torch.sigmoid(moe.shared_expert_gate(x)) * moe.shared_expert(x)
        return routed + shared, router_logits

    return forward


def _int8_cache(
    name: str, plan: QuantizationPlan
) -> Callable[[nn.Module, tuple[Tensor, Tensor, Tensor, Attend]], tuple[Tensor, Tensor, Tensor, Attend]]:
    """Hands attention keys, after their rotation, and values as an int8 cache gives them back."""
    key, value = (torch.tensor([plan.cache_scale(f"{name}.{part}")]) for part in ("key", "value"))

    def hook(
        _module: nn.Module, arguments: tuple[Tensor, Tensor, Tensor, Attend]
    ) -> tuple[Tensor, Tensor, Tensor, Attend]:
        x, cos, sin, attend = arguments

        def rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, round_to(k, key.to(k.device)), round_to(v, value.to(v.device)))

        return x, cos, sin, rounded

    return hook


@contextmanager
def _override(module: nn.Module, method: str, replacement: Callable[..., Any]) -> Iterator[None]:
    setattr(module, method, replacement)
    try:
        yield
    finally:
        delattr(module, method)
