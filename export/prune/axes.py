"""Along which axes of a model its weights run: what is kept of an axis is kept in every weight that has it.

An axis is named by what its units belong to: "hidden", "vocabulary", "model.layers.3.self_attn.heads",
"model.layers.3.self_attn.kv_heads", "model.layers.3.mlp", "model.layers.3.moe.experts" (the experts themselves),
"model.layers.3.moe.experts.2" and "model.layers.3.moe.shared_expert" (their inner widths), "visual.blocks.5.mlp".
"""

from __future__ import annotations

import re

import msgspec
import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig

HIDDEN, VOCABULARY = "hidden", "vocabulary"
LAYERS, VISION_LAYERS = "model.layers", "visual.blocks"
_INNER = re.compile(r"(.*\.(?:mlp|experts\.\d+|shared_expert))\.(gate_proj|up_proj|down_proj|fc1|fc2)\.(weight|bias)$")
_NORM = re.compile(r"model\.(norm|layers\.\d+\.(input_layernorm|post_attention_layernorm))\.weight$")


class Along(msgspec.Struct, frozen=True):
    """The axes of a weight's rows and columns; None where nothing is ever taken away."""

    rows: str | None = None
    columns: str | None = None
    unit_rows: int = 1  # of the weight, for each unit of the axis: a head has several
    unit_columns: int = 1


def along(key: str, head_dim: int) -> Along:
    """The axes of the weight called `key`, in a decoder whose heads have `head_dim` values."""
    if key in ("model.embed_tokens.weight", "lm_head.weight"):
        return Along(VOCABULARY, HIDDEN)
    if is_norm(key) or key == "visual.merger.mlp.2.bias":
        return Along(HIDDEN)
    if key == "visual.merger.mlp.2.weight":
        return Along(HIDDEN)
    if inner := _INNER.match(key):
        owner, leaf, kind = inner.groups()
        outside = None if owner.startswith("visual.") else HIDDEN
        if leaf in ("down_proj", "fc2"):
            return Along(outside) if kind == "bias" else Along(outside, owner)
        return Along(owner) if kind == "bias" else Along(owner, outside)
    if key.startswith("visual."):
        return Along()
    attention, inside, leaf = key.partition(".self_attn.")
    if inside:
        axis = f"{attention}.self_attn." + ("kv_heads" if leaf[0] in "kv" else "heads")
        if leaf == "o_proj.weight":
            return Along(HIDDEN, axis, unit_columns=head_dim)
        return Along(axis, HIDDEN if leaf.endswith("weight") else None, unit_rows=head_dim)
    if key.endswith(".moe.gate.weight"):
        return Along(key.replace(".gate.weight", ".experts"), HIDDEN)
    if key.endswith((".moe.shared_expert_gate.weight", ".coefficient.weight")):
        return Along(None, HIDDEN)
    return Along()


def is_norm(key: str) -> bool:
    """Whether a weight is the scale of a norm over the hidden channels of the decoder."""
    return _NORM.match(key) is not None


def inner_axes(config: ModelConfig, layer: int) -> dict[str, int]:
    """The inner widths of a decoder layer of `config`, by axis."""
    name = f"{LAYERS}.{layer}"
    sizes = {f"{name}.mlp": config.intermediate_size}
    if config.moe is not None:
        moe = config.moe
        sizes |= {f"{name}.moe.experts.{expert}": moe.moe_intermediate_size for expert in range(moe.num_experts)}
        sizes[f"{name}.moe.shared_expert"] = moe.shared_expert_intermediate_size
    return sizes


def spread_units(units: Tensor, width: int) -> Tensor:
    """Indices of rows for indices of units that have `width` rows each."""
    return (units.unsqueeze(1) * width + torch.arange(width)).flatten()
