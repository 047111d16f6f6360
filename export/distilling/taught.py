"""What the teacher says about a batch: the image tokens, and at every answer token its words, states and routing."""

from __future__ import annotations

from typing import Protocol

import msgspec
import torch
from torch import Tensor

from sonoedge.export.corpus import Batch
from sonoedge.export.distilling.draws import Pass
from sonoedge.export.distilling.losses import TopK, top_k
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.packing import IGNORE


class Wanted(msgspec.Struct, frozen=True):
    """Which of the teacher's outputs the losses need."""

    temperature: float
    top_k: int  # of the next-token distribution; 0: all of it
    logits: bool
    hidden_layers: tuple[int, ...]  # whose outputs are matched
    router_layers: tuple[int, ...]


class Taught(msgspec.Struct, frozen=True):
    """The teacher's outputs for one batch; rows are the answer tokens, sample after sample."""

    embeds: Tensor  # [merged, hidden] image tokens
    logits: Tensor | TopK | None = None  # [rows, vocab], or its top k
    hidden: tuple[Tensor, ...] = ()  # of each wanted layer [rows, hidden]
    router: tuple[Tensor, ...] = ()  # of each wanted layer [rows, experts]

    def to(self, device: torch.device) -> Taught:
        """The same on `device`."""
        return Taught(
            self.embeds.to(device),
            None if self.logits is None else self.logits.to(device),
            tuple(tensor.to(device) for tensor in self.hidden),
            tuple(tensor.to(device) for tensor in self.router),
        )


class Teaches(Protocol):
    """A teacher: at work beside the student, or recorded."""

    def taught(self, item: Pass, *, vision_only: bool) -> Taught:
        """What it says about the samples of a pass; only the image tokens where vision alone is trained."""
        ...


class LiveTeacher:
    """The teacher itself, on the device where the student trains."""

    def __init__(self, model: EchoVLM, wanted: Wanted, device: torch.device) -> None:
        self._model, self._wanted, self._device = model, wanted, device

    def taught(self, item: Pass, *, vision_only: bool) -> Taught:
        """Run it."""
        return ask(self._model, item.batch.to(self._device), self._wanted, vision_only=vision_only)


@torch.no_grad()
def ask(model: EchoVLM, batch: Batch, wanted: Wanted, *, vision_only: bool = False) -> Taught:
    """Run `model` over a batch on its device."""
    embeds = model.encode_images(batch.patches, batch.grids)
    if vision_only or not (wanted.logits or wanted.hidden_layers or wanted.router_layers):
        return Taught(embeds)
    packed = batch.packed
    rows = packed.labels != IGNORE  # [B, S]
    output = model(
        packed.input_ids,
        packed.positions,
        image_embeds=embeds,
        attention_bias=packed.attention_bias,
        logits_rows=rows,
        collect_hidden=bool(wanted.hidden_layers),
        collect_router=bool(wanted.router_layers),
    )
    said: Tensor | TopK | None = None
    if wanted.logits:
        said = top_k(output.logits, wanted.top_k, wanted.temperature) if wanted.top_k else output.logits
    return Taught(
        embeds,
        said,
        # Hidden states begin with the embeddings, so a layer's output stands one further.
        tuple(output.hidden_states[layer + 1][rows] for layer in wanted.hidden_layers),
        tuple(output.router_logits[layer][rows] for layer in wanted.router_layers),
    )
