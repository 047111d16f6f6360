"""EchoVLM: a Qwen2-VL whose decoder layers blend the dense feed-forward with a mixture of experts, token by token."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.attention import Attend, SelfAttention, attention, causal_visible, visible_bias
from sonoedge.export.models.cache import KVCache
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.layers import Embedding, Linear, RMSNorm, SwiGLU
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.models.rope import Grid, mrope_tables, require_stills, vision_tables
from sonoedge.export.models.vision import VisionTower
from sonoedge.export.models.vision_reach import reach_of


class ModelOutput(NamedTuple):
    """What a pass gives; the tuples are None unless asked for."""

    logits: Tensor  # [B, rows, vocab], or [picked, vocab] for a boolean logits_rows
    hidden_states: tuple[Tensor, ...] | None  # layers + 1 of [B, S, hidden]: embeddings, …, after the final norm
    router_logits: tuple[Tensor, ...] | None  # layers of [B, S, experts]; empty for a dense model


class DecoderLayer(nn.Module):
    """Attention, then c[0] · moe(x) + c[1] · mlp(x) with c = softmax(coefficient(x)); a dense layer has mlp alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.is_mixture = config.moe is not None
        if config.moe is not None:
            self.moe = SparseMoE(config.hidden_size, config.moe)
            self.coefficient = Linear(config.hidden_size, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> tuple[Tensor, Tensor | None]:
        """x [B, S, hidden], cos and sin [B, S, head_dim / 2]; gives the new x and the router logits [B, S, experts]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        normed = self.post_attention_layernorm(x)
        dense = self.mlp(normed)
        if not self.is_mixture:
            return x + dense, None
        mixed, router_logits = self.moe(normed)
        blend = functional.softmax(self.coefficient(normed), dim=-1)  # [B, S, 2]
        return x + (blend[..., :1] * mixed + blend[..., 1:] * dense), router_logits


class Decoder(nn.Module):
    """The parts that the checkpoint keeps under `model.`: embeddings, layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class EchoVLM(nn.Module):
    """The whole model, its parameters named as a released checkpoint's keys (dense Qwen2-VL or
    Qwen2.5-VL when config.moe is None).

    Constructed with every matrix at zero: `load_checkpoint` and `init_model` are what fill it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def encode_images(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Image tokens of all images, patches [n, patch_values] to [n / merge², hidden]; each frame alone."""
        merge = self.config.vision.spatial_merge_size
        require_stills(grids, self.config.vision)
        if any(rows % merge or columns % merge for _, rows, columns in grids):
            raise SonoEdgeError(
                f"grids {list(grids)} do not split into blocks of {merge} x {merge} patches; resize so that they do."
            )
        needed = sum(count * rows * columns for count, rows, columns in grids)
        if needed != patches.shape[0]:
            raise SonoEdgeError(f"{patches.shape[0]} patches do not fill the grids {list(grids)}, which need {needed}.")
        cos, sin = vision_tables(grids, self.config.vision, patches.device)
        encoded: Tensor = self.visual(patches, cos, sin, reach_of(grids, self.config.vision, patches.device))
        return encoded

    def embed(self, input_ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Embeddings [B, S, hidden] of input_ids [B, S], image_embeds [m, hidden] in place of image tokens."""
        embedded: Tensor = self.model.embed_tokens(input_ids)
        if image_embeds is None:
            return embedded
        is_image = input_ids == self.config.image_token_id  # [B, S]
        if not torch.compiler.is_exporting() and int(is_image.sum()) != image_embeds.shape[0]:
            raise SonoEdgeError(
                f"the text holds {int(is_image.sum())} image tokens but the images give {image_embeds.shape[0]}; "
                "write one image token for each."
            )
        # A running count picks each image token's row: fixed shapes, unlike a masked scatter.
        order = (is_image.flatten().cumsum(0) - 1).clamp(min=0).view_as(input_ids)
        return torch.where(is_image.unsqueeze(-1), image_embeds.to(embedded.dtype)[order], embedded)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] of final hidden states [..., hidden]."""
        head = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return functional.linear(hidden, head)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        *,
        image_embeds: Tensor | None = None,
        attention_bias: Tensor | None = None,
        cache: KVCache | None = None,
        logits_rows: Tensor | None = None,
        collect_hidden: bool = False,
        collect_router: bool = False,
    ) -> ModelOutput:
        """Embed input_ids [B, S] with image_embeds [m, hidden] and decode; see `decode` for the rest."""
        return self.decode(
            self.embed(input_ids, image_embeds),
            positions,
            attention_bias=attention_bias,
            cache=cache,
            logits_rows=logits_rows,
            collect_hidden=collect_hidden,
            collect_router=collect_router,
        )

    def decode(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        attention_bias: Tensor | None = None,
        cache: KVCache | None = None,
        logits_rows: Tensor | None = None,
        collect_hidden: bool = False,
        collect_router: bool = False,
    ) -> ModelOutput:
        """Run the decoder over embeddings x [B, S, hidden] at positions [3, B, S].

        attention_bias: additive [B or 1, 1, S, past + S], None for causal. logits_rows: int64 [r] picks the same rows
        of every sequence, bool [B, S] any rows (logits [picked, vocab]), None all rows.
        """
        cos, sin = mrope_tables(positions, self.config, x.dtype)
        rows = x.shape[1]
        if attention_bias is None and rows > 1:
            columns = rows + (0 if cache is None else cache.length)
            attention_bias = visible_bias(causal_visible(rows, columns, x.device), x.dtype)
        hidden_states: list[Tensor] = []
        routers: list[Tensor] = []
        for index, layer in enumerate(self.model.layers):
            if collect_hidden:
                hidden_states.append(x)
            x, router_logits = layer(x, cos, sin, partial(_attend, bias=attention_bias, cache=cache, layer=index))
            if collect_router and router_logits is not None:
                routers.append(router_logits)
        x = self.model.norm(x)
        hidden_states.append(x)
        return ModelOutput(
            logits=self.project(_pick_rows(x, logits_rows)),
            hidden_states=tuple(hidden_states) if collect_hidden else None,
            router_logits=tuple(routers) if collect_router else None,
        )


def _attend(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, S, D]
    if cache is not None:
        k, v = cache.append(layer, k, v)
    return attention(q, k, v, bias).transpose(1, 2)


def _pick_rows(x: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return x
    return x[rows] if rows.dtype == torch.bool else x[:, rows]
