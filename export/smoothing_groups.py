"""Where SmoothQuant can move factors in an EchoVLM so that its function stays the same: who makes, who reads a channel.

Nothing moves through a quick-GELU or GELU of the vision tower (fc2, merger.mlp.2), nor into the patches (patch_embed).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig, VisionConfig


class Producer(msgspec.Struct, frozen=True):
    """The rows of a weight, a bias or a norm that make the channels of a group."""

    key: str
    first_row: int = 0
    rows: int | None = None  # of the whole tensor; None: as many as the group has channels


class SmoothingGroup(msgspec.Struct, frozen=True):
    """Channels whose factors divide the rows of `producers` and multiply the columns of all that read them."""

    name: str  # of the module that makes the channels
    channels: int
    producers: tuple[Producer, ...]
    consumers: tuple[str, ...]  # keys of products that share this input [..., columns]
    float_consumers: tuple[str, ...] = ()  # keys of linear layers that read it too and are never quantized
    repeats: int = 1  # columns that read one channel
    block: int | None = None  # channels that repeat together: columns are `block` channels `repeats` times, and so on

    @property
    def channel(self) -> Tensor:
        """The channel of every column, int64 [columns]."""
        block = self.block or self.channels
        return torch.arange(self.channels).view(-1, 1, block).expand(-1, self.repeats, -1).flatten()


class Factors(msgspec.Struct):
    """Row and column factors of weights, gathered group by group."""

    rows: dict[str, Tensor]  # float32 [rows]
    columns: dict[str, Tensor]  # float32 [columns]

    def add(self, group: SmoothingGroup, factors: Tensor) -> None:
        """Divide what makes the group's channels by `factors` [channels], multiply what reads them."""
        for producer in group.producers:
            rows = torch.ones(producer.rows or group.channels)
            rows[producer.first_row : producer.first_row + group.channels] = 1 / factors
            self.rows[producer.key] = rows
        for key in (*group.consumers, *group.float_consumers):
            self.columns[key] = factors[group.channel]


def smoothing_groups(config: ModelConfig) -> dict[str, tuple[SmoothingGroup, ...]]:
    """The groups of every block of the model, by the block's name."""
    groups = {
        f"visual.blocks.{n}": _vision_block(f"visual.blocks.{n}", config.vision) for n in range(config.vision.depth)
    }
    groups["visual.merger"] = _merger("visual.merger", config.vision)
    for n in range(config.num_hidden_layers):
        groups[f"model.layers.{n}"] = _decoder_layer(f"model.layers.{n}", config)
    groups["model.norm"] = _head(config)
    return groups


def _vision_block(block: str, config: VisionConfig) -> tuple[SmoothingGroup, ...]:
    width, gated = config.embed_dim, config.windows is not None
    values = [Producer(f"{block}.attn.qkv.{part}", 2 * width, 3 * width) for part in ("weight", "bias")]
    readers = [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"] if gated else [f"{block}.mlp.fc1"]
    return (
        _norm(f"{block}.norm1", width, [f"{block}.attn.qkv"], bias=not gated),
        SmoothingGroup(f"{block}.attn.qkv", width, tuple(values), (f"{block}.attn.proj.weight",)),
        _norm(f"{block}.norm2", width, readers, bias=not gated),
        *((_swiglu(f"{block}.mlp", config.mlp_size, bias=True),) if gated else ()),
    )


def _merger(merger: str, config: VisionConfig) -> tuple[SmoothingGroup, ...]:
    norm = _norm(f"{merger}.ln_q", config.embed_dim, [f"{merger}.mlp.0"], bias=config.windows is None)
    return (msgspec.structs.replace(norm, repeats=config.spatial_merge_size**2),)


def _decoder_layer(layer: str, config: ModelConfig) -> tuple[SmoothingGroup, ...]:
    hidden = config.hidden_size
    attention = [f"{layer}.self_attn.{part}_proj" for part in "qkv"]
    readers = [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
    swiglus = [(f"{layer}.mlp", config.intermediate_size)]
    never_quantized: list[str] = []
    if config.moe is not None:
        moe = f"{layer}.moe"
        mixed = [(f"{moe}.experts.{n}", config.moe.moe_intermediate_size) for n in range(config.moe.num_experts)]
        mixed.append((f"{moe}.shared_expert", config.moe.shared_expert_intermediate_size))
        readers += [f"{swiglu}.{part}_proj" for swiglu, _ in mixed for part in ("gate", "up")]
        swiglus += mixed
        never_quantized = [f"{moe}.gate", f"{moe}.shared_expert_gate", f"{layer}.coefficient"]
    return (
        _norm(f"{layer}.input_layernorm", hidden, attention),
        _values(f"{layer}.self_attn", config),
        _norm(f"{layer}.post_attention_layernorm", hidden, readers, never_quantized),
        *(_swiglu(swiglu, width) for swiglu, width in swiglus),
    )


def _values(attention: str, config: ModelConfig) -> SmoothingGroup:
    """v_proj to o_proj: a channel of a key-value head reaches every query head of its group (arXiv 2305.13245)."""
    made = f"{attention}.v_proj"
    return SmoothingGroup(
        made,
        config.num_key_value_heads * config.head_dim,
        (Producer(f"{made}.weight"), Producer(f"{made}.bias")),
        (f"{attention}.o_proj.weight",),
        repeats=config.num_attention_heads // config.num_key_value_heads,
        block=config.head_dim,
    )


def _swiglu(swiglu: str, width: int, *, bias: bool = False) -> SmoothingGroup:
    """up_proj to down_proj: the gate's SiLU multiplies what up makes, so factors of up pass through."""
    made = f"{swiglu}.up_proj"
    parts = ("weight", "bias") if bias else ("weight",)
    producers = tuple(Producer(f"{made}.{part}") for part in parts)
    return SmoothingGroup(made, width, producers, (f"{swiglu}.down_proj.weight",))


def _head(config: ModelConfig) -> tuple[SmoothingGroup, ...]:
    # A tied head is the embedding as well, which nothing divides.
    return () if config.tie_word_embeddings else (_norm("model.norm", config.hidden_size, ["lm_head"]),)


def _norm(
    norm: str, width: int, consumers: Sequence[str], float_consumers: Sequence[str] = (), *, bias: bool = False
) -> SmoothingGroup:
    return SmoothingGroup(
        norm,
        width,
        tuple(Producer(f"{norm}.{part}") for part in (("weight", "bias") if bias else ("weight",))),
        tuple(f"{name}.weight" for name in consumers),
        tuple(f"{name}.weight" for name in float_consumers),
    )
