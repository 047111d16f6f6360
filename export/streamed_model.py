"""An EchoVLM run one block at a time, for checkpoints that do not fit in memory: one block's weights are held at once.

All samples pass a block before the next one is read, so between blocks only their hidden states are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import torch
from torch import Tensor, nn

from sonoedge.errors import SonoEdgeError
from sonoedge.export.corpus import Batch
from sonoedge.export.models.attention import attention, visible_bias
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import DecoderLayer
from sonoedge.export.models.layers import RMSNorm
from sonoedge.export.models.rope import Grid, mrope_tables, vision_tables
from sonoedge.export.models.vision import PatchEmbed, PatchMerger, VisionBlock
from sonoedge.export.models.vision_reach import reach_of
from sonoedge.export.routed_moe import RoutedMoE
from sonoedge.export.weights import Weights
from sonoedge.progress import track

FINAL_NORM = "model.norm"
# (keys after rotation, values), both [1, S, kv_heads, D]
NoteCache = Callable[[Tensor, Tensor], None]


class Passage(msgspec.Struct):
    """One sequence on its way through the model."""

    grids: list[Grid]
    input_ids: Tensor  # int64 [1, S]
    positions: Tensor  # int64 [3, 1, S]
    visible: Tensor  # bool [1, 1, S, S]
    x: Tensor  # patches [n, patch_values], then [n, embed_dim], image tokens [m, hidden], then [1, S, hidden]
    region: str | None = None


def ignore_cache(keys: Tensor, values: Tensor) -> None:
    """Leave the keys and values that a layer makes unseen."""


class Block(msgspec.Struct, frozen=True):
    """A part of the model whose weights are in memory."""

    name: str  # what its weights' keys begin with
    module: nn.Module
    forward: Callable[[nn.Module, Passage, NoteCache], Tensor]

    def run(self, passage: Passage, note_cache: NoteCache = ignore_cache) -> Tensor:
        """What the block makes of `passage`, whose x stays; `note_cache` sees the keys and values on the way."""
        return self.forward(self.module, passage, note_cache)


class _Stage(msgspec.Struct, frozen=True):
    """A block before its weights are read."""

    name: str
    make: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Passage, NoteCache], Tensor]

    def load(self, weights: Weights) -> Block:
        """Read the block's weights as float32, one tensor at a time."""
        with torch.device("meta"):
            module = self.make()
        for name, _ in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(weights.tensor(f"{self.name}.{name}"), requires_grad=False)
            module.get_submodule(owner).register_parameter(leaf, value)
        return Block(self.name, module.eval(), self.forward)


def passage(batch: Batch, region: str | None = None) -> Passage:
    """The start of a batch of one sequence."""
    packed = batch.packed
    return Passage(batch.grids, packed.input_ids, packed.positions, packed.attention_bias == 0, batch.patches, region)


def stream(
    weights: Weights, passages: Sequence[Passage], through: Callable[[Block, Sequence[Passage]], None], label: str
) -> None:
    """Take `passages` up to the final norm's output; `through` replaces every x by what the block makes of it.

    `through` must keep no block: its memory is the next one's. Passages without images skip the vision tower.
    """
    pictured = [passage for passage in passages if passage.grids]
    vision = _vision_stages(weights.config) if pictured else []
    decoder = _decoder_stages(weights.config)
    with track(label, len(vision) + len(decoder)) as advance:

        def pass_through(stages: Sequence[_Stage], some: Sequence[Passage]) -> None:
            for stage in stages:
                advance(0, stage.name)
                through(stage.load(weights), some)
                advance(1)

        pass_through(vision, pictured)
        _embed(weights, passages)
        pass_through(decoder, passages)


def _embed(weights: Weights, passages: Sequence[Passage]) -> None:
    """Text and image tokens of every passage, reading only the embeddings of tokens that occur."""
    image = weights.config.image_token_id
    occurring = torch.cat([passage.input_ids.flatten() for passage in passages]).unique()
    table = weights.rows("model.embed_tokens.weight", occurring.tolist())
    for passage in passages:
        is_image = passage.input_ids == image
        given = passage.x.shape[0] if passage.grids else 0
        if int(is_image.sum()) != given:
            raise SonoEdgeError(
                f"the text holds {int(is_image.sum())} image tokens but the images give {given}; "
                "write one image token for each."
            )
        embedded = table[torch.searchsorted(occurring, passage.input_ids)]  # [1, S, hidden]
        if given:
            embedded[is_image] = passage.x
        passage.x = embedded


def _vision_stages(config: ModelConfig) -> list[_Stage]:
    vision = config.vision

    def attend(block: nn.Module, passage: Passage, _note: NoteCache, index: int) -> Tensor:
        cos, sin = vision_tables(passage.grids, vision, passage.x.device)
        reach = reach_of(passage.grids, vision, passage.x.device)
        result: Tensor = block(passage.x, cos, sin, reach.of(index, vision))
        return result

    return [
        _Stage("visual.patch_embed", partial(PatchEmbed, vision), _apply),
        *(
            _Stage(f"visual.blocks.{index}", partial(VisionBlock, vision), partial(attend, index=index))
            for index in range(vision.depth)
        ),
        _Stage("visual.merger", partial(PatchMerger, vision), _apply),
    ]


def _decoder_stages(config: ModelConfig) -> list[_Stage]:
    def make() -> DecoderLayer:
        layer = DecoderLayer(config)
        if config.moe is not None:
            layer.moe = RoutedMoE(config.hidden_size, config.moe)
        return layer

    def decode(layer: nn.Module, passage: Passage, note: NoteCache) -> Tensor:
        cos, sin = mrope_tables(passage.positions, config, passage.x.dtype)
        bias = visible_bias(passage.visible, passage.x.dtype)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            note(k, v)
            return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias).transpose(1, 2)

        result: Tensor = layer(passage.x, cos, sin, attend)[0]
        return result

    return [
        *(_Stage(f"model.layers.{index}", make, decode) for index in range(config.num_hidden_layers)),
        _Stage(FINAL_NORM, partial(RMSNorm, config.hidden_size, config.rms_norm_eps), _apply),
    ]


def _apply(module: nn.Module, passage: Passage, _note: NoteCache) -> Tensor:
    result: Tensor = module(passage.x)
    return result
