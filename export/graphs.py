"""The model as ONNX graphs, exported from its sizes alone: the vision tower, and the decoder with its KV cache.

No weight is read: every parameter leaves as an initializer without a value, named as the checkpoint names it, and
`export.lowering` says where its bytes are.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import Tensor, nn

from sonoedge.export.markers import DOMAIN, LM_HEAD, checkpoint_key, linear_mark, marked, probe_mark
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import empty_model
from sonoedge.export.models.rope import VISION_THETA, mrope_tables
from sonoedge.export.models.vision_reach import reach_by_mask
from sonoedge.export.scheme import CacheScheme

OPSET = 21


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
        encoded: Tensor = self.tower(patches, angles.cos(), angles.sin(), reach_by_mask(places, self.tower.config))
        return encoded


class DecoderGraph(nn.Module):
    """Token ids, image tokens and the cache to logits of the rows asked for and the cache with the new tokens."""

    def __init__(self, model: EchoVLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,  # int64 [1, S]
        positions: Tensor,  # int64 [3, 1, S]
        image_embeds: Tensor,  # float32 [m, hidden], at least one row, unused rows ignored
        attention_bias: Tensor,  # float32 [1, 1, S, past + S]
        logits_rows: Tensor,  # int64 [r]
        last_token: Tensor,  # int32 [1]: past + S - 1
        total_tokens: Tensor,  # int32 []: past + S
        past: list[Tensor],  # keys and values of each layer, [1, kv_heads, context, head_dim], float32 or int8
    ) -> tuple[Tensor, ...]:
        config = self.model.config
        x = self.model.embed(input_ids, image_embeds)
        cos, sin = mrope_tables(positions, config, x.dtype)
        present: list[Tensor] = []
        for index, layer in enumerate(self.model.model.layers):
            past_key, past_value = past[2 * index], past[2 * index + 1]

            def attend(
                q: Tensor,
                k: Tensor,
                v: Tensor,
                past_key: Tensor = past_key,
                past_value: Tensor = past_value,
                name: str = f"model.layers.{index}.self_attn",
            ) -> Tensor:
                flat = (q.flatten(2), k.flatten(2), v.flatten(2))  # [1, S, heads · D]
                mixed, key, value = torch.onnx.ops.symbolic_multi_out(
                    f"{DOMAIN}::Attention",
                    (*flat, past_key, past_value, last_token, total_tokens, attention_bias),
                    {"name": name, "num_heads": config.num_attention_heads, "kv_num_heads": config.num_key_value_heads},
                    dtypes=(q.dtype, past_key.dtype, past_value.dtype),
                    shapes=(flat[0].shape, past_key.shape, past_value.shape),
                    version=1,
                )
                present.extend((key, value))
                return mixed.view(q.shape)

            x, _ = layer(x, cos, sin, attend)
            x = probe_mark(f"probe.hidden.{index}", x)
        picked = self.model.model.norm(x)[0, logits_rows]  # [r, hidden]
        head = self.model.model.embed_tokens.weight if config.tie_word_embeddings else self.model.lm_head.weight
        return linear_mark(LM_HEAD, picked, head, None), *present


def export_vision(config: ModelConfig) -> ir.Model:
    """The vision tower as a marked graph: inputs `patches`, `places`, output `image_embeds`; any number of patches."""
    merge = config.vision.spatial_merge_size**2
    patches = torch.zeros(4 * merge, config.vision.patch_values)
    count = merge * torch.export.Dim("blocks", min=1, max=1 << 14)
    return _export(
        VisionGraph(marked(_hollow_model(config))),
        (patches, torch.zeros(4 * merge, 2, dtype=torch.int64)),
        ({0: count}, {0: count}),
        ["patches", "places"],
        ["image_embeds"],
    )


def export_decoder(config: ModelConfig, context: int, cache: CacheScheme = CacheScheme.FLOAT) -> ir.Model:
    """The decoder as a marked graph, inputs named as those of `DecoderGraph.forward`; `context`: the cache's tokens.

    The cache goes in as `past_key_N`, `past_value_N` and comes out as `present_key_N`, `present_value_N`.
    """
    layers, seen, new = config.num_hidden_layers, 5, 3
    dtype = torch.float32 if cache is CacheScheme.FLOAT else torch.int8
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    arguments = (
        torch.zeros(1, new, dtype=torch.int64),
        torch.zeros(3, 1, new, dtype=torch.int64),
        torch.zeros(2, config.hidden_size),
        torch.zeros(1, 1, new, seen + new),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        torch.zeros((), dtype=torch.int32),
        [torch.zeros(shape, dtype=dtype) for _ in range(2 * layers)],
    )
    dynamic = torch.export.Dim.DYNAMIC
    shapes: tuple[object, ...] = (
        {1: dynamic},
        {2: dynamic},
        {0: dynamic},
        {2: dynamic, 3: dynamic},
        {0: dynamic},
        {},
        {},
        [{}] * (2 * layers),
    )
    names = [f"{part}_{index}" for index in range(layers) for part in ("key", "value")]
    inputs = ["input_ids", "positions", "image_embeds", "attention_bias", "logits_rows", "last_token", "total_tokens"]
    return _export(
        DecoderGraph(marked(_hollow_model(config))),
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
            optimize=False,
            verbose=False,
        )
    assert program is not None  # None only when a file is asked for in the old exporter
    parameters = {name for name, _ in module.named_parameters()}
    _hide_values(program.model, parameters)
    # The optimiser names every initializer without a value; they are meant to have none yet.
    logging.getLogger("onnx_ir.passes.common.initializer_deduplication").setLevel(logging.ERROR)
    optimizer.optimize_ir(program.model)
    _name_as_checkpoint(program.model, parameters)
    return program.model


def _hollow_model(config: ModelConfig) -> EchoVLM:
    """The model with parameters of the right shapes over four bytes of memory each: an export looks at nothing else."""
    model = empty_model(config)
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        hollow = nn.Parameter(torch.zeros(1).expand(parameter.shape), requires_grad=False)
        model.get_submodule(owner).register_parameter(leaf, hollow)
    return model


def _hide_values(model: ir.Model, parameters: Collection[str]) -> None:
    """Take the values from the parameters, so that nothing is computed from them."""
    for name, value in model.graph.initializers.items():
        if name in parameters:
            value.const_value = None


def _name_as_checkpoint(model: ir.Model, parameters: Collection[str]) -> None:
    """Give every parameter the name of its key in the checkpoint."""
    for name in [name for name in model.graph.initializers if name in parameters]:
        value = model.graph.initializers.pop(name)
        value.name = checkpoint_key(name)
        model.graph.initializers[value.name] = value
