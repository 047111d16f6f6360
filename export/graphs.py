"""The model as ONNX graphs, exported from the torch definition: the vision tower, and the decoder with its KV cache."""

from __future__ import annotations

import logging
import warnings
from enum import Enum

import onnx_ir as ir
import torch
from torch import Tensor, nn

from sonoedge.export.markers import linear_mark, marked
from sonoedge.export.models.attention import attention
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.rope import VISION_THETA, mrope_tables

OPSET = 21


class Attention(Enum):
    """Who keeps the KV cache: ONNX Runtime's operator writes it in place, standard operators return it grown."""

    IN_PLACE = "com.microsoft::GroupQueryAttention"
    STANDARD = "standard"


class VisionGraph(nn.Module):
    """patches [n, 1176] and their rows and columns [n, 2] to image tokens [n / merge², hidden], for one image."""

    def __init__(self, model: EchoVLM) -> None:
        super().__init__()
        self.tower = model.visual
        half = model.config.vision.head_dim // 2
        self.register_buffer("frequency", 1.0 / VISION_THETA ** (torch.arange(0, half, 2, dtype=torch.float32) / half))

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        frequency: Tensor = self.frequency  # type: ignore[assignment]  # a buffer is typed Tensor | Module
        angles = (places.to(torch.float32).unsqueeze(-1) * frequency).flatten(1)  # [n, head_dim / 2]
        encoded: Tensor = self.tower(patches, angles.cos(), angles.sin())
        return encoded


class DecoderGraph(nn.Module):
    """Token ids, image tokens and the cache to logits of the rows asked for and the cache with the new tokens."""

    def __init__(self, model: EchoVLM, kind: Attention) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(
        self,
        input_ids: Tensor,  # int64 [1, S]
        positions: Tensor,  # int64 [3, 1, S]
        image_embeds: Tensor,  # float32 [m, hidden], at least one row, unused rows ignored
        attention_bias: Tensor,  # float32 [1, 1, S, past + S]
        logits_rows: Tensor,  # int64 [r]
        last_token: Tensor,  # int32 [1]: past + S - 1
        total_tokens: Tensor,  # int32 []: past + S
        past: list[Tensor],  # keys and values of each layer, [1, kv_heads, capacity or past, head_dim]
    ) -> tuple[Tensor, ...]:
        config = self.model.config
        x = self.model.embed(input_ids, image_embeds)
        cos, sin = mrope_tables(positions, config, x.dtype)
        present: list[Tensor] = []
        for index, layer in enumerate(self.model.model.layers):
            past_key, past_value = past[2 * index], past[2 * index + 1]

            def attend(
                q: Tensor, k: Tensor, v: Tensor, past_key: Tensor = past_key, past_value: Tensor = past_value
            ) -> Tensor:
                if self.kind is Attention.STANDARD:
                    key = torch.cat((past_key, k.transpose(1, 2)), dim=2)
                    value = torch.cat((past_value, v.transpose(1, 2)), dim=2)
                    present.extend((key, value))
                    return attention(q.transpose(1, 2), key, value, attention_bias).transpose(1, 2)
                flat = (q.flatten(2), k.flatten(2), v.flatten(2))  # [1, S, heads · D]
                unused = (None, None, None)  # rotary tables and position ids: positions are rotated above
                mixed, key, value = torch.onnx.ops.symbolic_multi_out(
                    self.kind.value,
                    (*flat, past_key, past_value, last_token, total_tokens, *unused, attention_bias),
                    {
                        "num_heads": config.num_attention_heads,
                        "kv_num_heads": config.num_key_value_heads,
                        "do_rotary": 0,
                    },
                    dtypes=(q.dtype, q.dtype, q.dtype),
                    shapes=(flat[0].shape, past_key.shape, past_value.shape),
                    version=1,
                )
                present.extend((key, value))
                return mixed.view(q.shape)

            x, _ = layer(x, cos, sin, attend)
        picked = self.model.model.norm(x)[0, logits_rows]  # [r, hidden]
        head = self.model.model.embed_tokens.weight if config.tie_word_embeddings else self.model.lm_head.weight
        return linear_mark("lm_head", picked, head, None), *present


def export_vision(model: EchoVLM) -> ir.Model:
    """The vision tower as a marked graph: inputs `patches`, `places`, output `image_embeds`; any number of patches."""
    merge = model.config.vision.spatial_merge_size**2
    patches = torch.zeros(4 * merge, model.config.vision.patch_values)
    count = merge * torch.export.Dim("blocks", min=1, max=1 << 14)
    return _export(
        VisionGraph(marked(model)),
        (patches, torch.zeros(4 * merge, 2, dtype=torch.int64)),
        ({0: count}, {0: count}),
        ["patches", "places"],
        ["image_embeds"],
    )


def export_decoder(model: EchoVLM, kind: Attention, context: int) -> ir.Model:
    """The decoder as a marked graph, inputs named as those of `DecoderGraph.forward`; `context`: the cache's tokens.

    The cache goes in as `past_key_N`, `past_value_N` and comes out as `present_key_N`, `present_value_N`.
    """
    config = model.config
    layers, seen, new = config.num_hidden_layers, 5, 3
    held = context if kind is Attention.IN_PLACE else seen
    cache = [torch.zeros(1, config.num_key_value_heads, held, config.head_dim) for _ in range(2 * layers)]
    arguments = (
        torch.zeros(1, new, dtype=torch.int64),
        torch.zeros(3, 1, new, dtype=torch.int64),
        torch.zeros(2, config.hidden_size),
        torch.zeros(1, 1, new, seen + new),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros((), dtype=torch.int32),
        cache,
    )
    dynamic = torch.export.Dim.DYNAMIC
    grown: list[dict[int, object]] = [{2: dynamic} if kind is Attention.STANDARD else {} for _ in cache]
    shapes: tuple[object, ...] = (
        {1: dynamic},
        {2: dynamic},
        {0: dynamic},
        {2: dynamic, 3: dynamic},
        {0: dynamic},
        {},
        {},
        grown,
    )
    names = [f"{part}_{index}" for index in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "positions", "image_embeds", "attention_bias", "logits_rows", "last_token", "total_tokens"]
    return _export(
        DecoderGraph(marked(model), kind),
        arguments,
        shapes,
        inputs + [f"past_{name}" for name in names],
        ["logits"] + [f"present_{name}" for name in names],
    )


def _export(
    module: nn.Module, arguments: tuple[object, ...], shapes: tuple[object, ...], inputs: list[str], outputs: list[str]
) -> ir.Model:
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns about its own internals (deprecated calls, unused symbols); none of it is ours to mend.
        warnings.simplefilter("ignore")
        # It also names every torchvision operator that it could not register, and none is used here.
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            arguments,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None  # None only when a file is asked for in the old exporter
    return program.model
