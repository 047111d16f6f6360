"""Importance as measured: calibration's frames pass the teacher once, block by block, and each unit's part is noted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.export.models.layers import RMSNorm
from sonoedge.export.product_inputs import listening
from sonoedge.export.prune.axes import HIDDEN, LAYERS, VISION_LAYERS
from sonoedge.export.prune.importance import Importance
from sonoedge.export.routing_survey import mixtures_of
from sonoedge.export.streamed_model import FINAL_NORM, Block, Passage, stream
from sonoedge.export.weights import Weights

WRITERS = ("o_proj", "down_proj", "fc2")  # products whose columns are the units of an axis


@torch.no_grad()
def measured_importance(checkpoint: Path, passages: Sequence[Passage]) -> Importance:
    """Scores of every axis of a checkpoint on `passages`, one block of it in memory at a time.

    Raises SonoEdgeError naming the product whose activations are not finite.
    """
    weights = Weights(checkpoint)
    survey = _Survey(weights.config.head_dim)
    stream(weights, passages, survey.through, "measure importance")
    tokens = sum(passage.input_ids.shape[1] for passage in passages)
    return Importance(survey.scores(), survey.energies, tokens)


class _Sums:
    """Sums of squares by channel, of values [..., channels] that come in pieces."""

    def __init__(self) -> None:
        self.squares: Tensor | None = None
        self.tokens = 0

    def add(self, values: Tensor) -> None:
        """Take in some tokens."""
        flat = values.flatten(0, -2)
        squares = flat.square().sum(0, dtype=torch.float64)
        self.squares = squares if self.squares is None else self.squares + squares
        self.tokens += flat.shape[0]

    @property
    def mean(self) -> Tensor:
        """Mean squares [channels]."""
        assert self.squares is not None  # asked only where a token came
        return self.squares / self.tokens


class _Survey:
    """Notes what passes through each block."""

    def __init__(self, head_dim: int) -> None:
        self._head_dim = head_dim
        self._scores: dict[str, Tensor] = {}
        self._influence: dict[str, list[float]] = {LAYERS: [], VISION_LAYERS: []}
        self._channels: Tensor | None = None
        self.energies: dict[str, Tensor] = {}

    def scores(self) -> dict[str, Tensor]:
        """Everything that was noted, by axis."""
        found = {axis: torch.tensor(held, dtype=torch.float64) for axis, held in self._influence.items() if held}
        assert self._channels is not None  # every model has a final norm
        return self._scores | found | {HIDDEN: self._channels}

    def through(self, block: Block, passages: Sequence[Passage]) -> None:
        """Note what `block` does to `passages`, and replace every x by what it makes of it."""
        modules = dict(block.module.named_modules())
        writers = {f"{block.name}.{leaf}": m for leaf, m in modules.items() if leaf.rpartition(".")[2] in WRITERS}
        norms = {
            f"{block.name}.{leaf}".rstrip("."): module
            for leaf, module in modules.items()
            if isinstance(module, RMSNorm) and block.name.startswith("model.")
        }
        mixtures = mixtures_of(block)
        columns, before = {name: _Sums() for name in writers}, {name: _Sums() for name in norms}
        masses: dict[str, Tensor] = {}
        changed, tokens = 0.0, 0

        def note(name: str, x: Tensor) -> None:
            if name in columns:
                columns[name].add(x)
            elif name in before:
                before[name].add(x)
            else:
                moe = mixtures[name]
                mass = moe.route(moe.gate(x)).flatten(0, -2).sum(0, dtype=torch.float64)
                masses[name] = masses[name] + mass if name in masses else mass

        with listening({**writers, **norms, **mixtures}, note):
            for passage in passages:
                after = block.run(passage)
                if _is_layer(block.name):
                    changed += float((1 - functional.cosine_similarity(passage.x, after, dim=-1)).sum())
                    tokens += after.flatten(0, -2).shape[0]
                passage.x = after
        if _is_layer(block.name):
            self._influence[block.name.rpartition(".")[0]].append(changed / tokens)
        self._scores |= masses
        for name, sums in columns.items():
            self._note_writer(name, writers[name], sums)
        for name, sums in before.items():
            self._note_norm(name, norms[name], sums.mean)

    def _note_writer(self, name: str, module: nn.Module, sums: _Sums) -> None:
        weight = module.get_parameter("weight")
        # An expert that no token chose is judged by its weights.
        met = sums.mean if sums.tokens else torch.ones(weight.shape[1], dtype=torch.float64)
        part = met * weight.square().sum(0, dtype=torch.float64)  # [columns]
        owner = name.rpartition(".")[0]
        if name.endswith(".o_proj"):
            self._scores[f"{owner}.heads"] = part.view(-1, self._head_dim).sum(1)
        else:
            self._scores[owner] = part

    def _note_norm(self, name: str, module: nn.Module, energy: Tensor) -> None:
        """What a norm makes of each channel, relative to the others, is what its readers are given."""
        given = energy / energy.mean() * module.get_parameter("weight").double().square()
        self._channels = given if self._channels is None else self._channels + given
        self.energies[f"{name}.weight"] = energy


def _is_layer(name: str) -> bool:
    return name != FINAL_NORM and name.rpartition(".")[0] in (LAYERS, VISION_LAYERS)
