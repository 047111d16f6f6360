"""Merging experts: those that stay take over what the others gave, by least squares on a region's own tokens.

The down projections of the experts that stay are solved for, layer by layer, such that their sum, weighted by the
router over them alone, comes closest to what all experts gave; a ridge holds them near where they were. Averages of
weights, the step that merges in P. Li et al., "Merge, then compress" (arXiv 2310.01334), lose more here than leaving
experts out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import open_checkpoint
from sonoedge.export.models.shards import TensorHeader
from sonoedge.export.pinning import Kept, pinned_config, torch_dtype
from sonoedge.export.product_inputs import listening
from sonoedge.export.routed_moe import RoutedMoE
from sonoedge.export.routing_survey import mixtures_of
from sonoedge.export.streamed_model import Block, Passage, stream
from sonoedge.export.weights import Weights

RIDGE = 1e-2  # of the mean square of a column; 1e-4 to 1e-1 give the same answers on the demo checkpoint
MOST_COLUMNS = 8192  # of the experts that stay, side by side: what is solved for takes their square in float64


def require_small(
    config: ModelConfig, experts: int, *, said: str = "preset.method = 'merge'", instead: str = "method = 'pin'"
) -> None:
    """Raise SonoEdgeError when so many `experts` are too wide to be solved for at once; `said` is the recipe's key."""
    assert config.moe is not None  # refused before
    columns = experts * config.moe.moe_intermediate_size
    if columns > MOST_COLUMNS:
        raise SonoEdgeError(
            f"{said} solves for {experts} experts of {config.moe.moe_intermediate_size} columns at "
            f"once, {columns} and at most {MOST_COLUMNS}: use {instead}, or keep fewer experts"
        )


@torch.no_grad()
def merge_experts(checkpoint: Path, passages: Sequence[Passage], kept: Kept, folder: Path) -> dict[str, TensorHeader]:
    """Solve for the down projections of the experts `kept` on `passages`, one layer's file after another in `folder`.

    Returns where each lies, by its key in the pinned checkpoint, in the checkpoint's own dtype.
    """
    weights = Weights(checkpoint)
    _, headers = open_checkpoint(checkpoint)
    config = pinned_config(weights.config, kept)
    folder.mkdir(exist_ok=True)
    placed: dict[str, TensorHeader] = {}

    def through(block: Block, some: Sequence[Passage]) -> None:
        mixtures = mixtures_of(block)
        fits = {name: _Fit(moe, _pinned(moe, kept[name], config)) for name, moe in mixtures.items()}
        with listening(mixtures, lambda name, x: fits[name].add(x.flatten(0, -2))):
            for passage in some:
                passage.x = block.run(passage)
        for name, fit in fits.items():
            file, solved = folder / f"{name}.safetensors", {}
            for expert, (number, tensor) in enumerate(zip(kept[name], fit.solved(), strict=True)):
                key, header = f"{name}.{expert}.down_proj.weight", headers[f"{name}.{number}.down_proj.weight"]
                solved[key] = tensor.to(torch_dtype(header.dtype)).contiguous()
                placed[key] = TensorHeader(file, header.shape, header.dtype)
            save_file(solved, file)

    stream(weights, passages, through, "merge experts")
    return placed


def _pinned(moe: RoutedMoE, kept: Sequence[int], config: ModelConfig) -> RoutedMoE:
    """The experts `kept` behind their own rows of the router; weights are shared, not copied."""
    assert config.moe is not None
    with torch.device("meta"):
        smaller = RoutedMoE(config.hidden_size, config.moe)
    smaller.gate.weight = nn.Parameter(moe.gate.weight[list(kept)], requires_grad=False)
    smaller.experts = nn.ModuleList(moe.experts[expert] for expert in kept)
    return smaller


class _Fit:
    """Gathers the normal equations of one layer: inputs of the down projections that stay, and what is missing."""

    def __init__(self, whole: RoutedMoE, pinned: RoutedMoE) -> None:
        self._whole, self._pinned = whole, pinned
        self._down = torch.cat([_down(expert) for expert in pinned.experts], dim=1)  # [hidden, K · I]
        hidden, columns = self._down.shape
        self._gram = torch.zeros(columns, columns, dtype=torch.float64)
        self._missing = torch.zeros(hidden, columns, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in tokens [n, hidden] at the mixture's input."""
        given = _weighted_hidden(self._pinned, x)  # [n, K · I]
        wanted = _weighted_hidden(self._whole, x) @ torch.cat([_down(expert) for expert in self._whole.experts], 1).T
        missing = wanted - given @ self._down.T  # [n, hidden]
        self._gram += given.T @ given
        self._missing += missing.T @ given

    def solved(self) -> tuple[Tensor, ...]:
        """The down projections [hidden, I] of the experts that stay, float32."""
        ridge = RIDGE * self._gram.diagonal().mean()
        system = self._gram + ridge * torch.eye(len(self._gram), dtype=torch.float64)
        change: Tensor = torch.linalg.solve(system, self._missing.T).T  # [hidden, K · I]
        return (self._down + change.to(torch.float32)).chunk(len(self._pinned.experts), dim=1)


def _weighted_hidden(moe: RoutedMoE, x: Tensor) -> Tensor:
    """Inputs of the down projections side by side, times their routing weights: x [n, hidden] to [n, experts · I]."""
    weights = moe.route(moe.gate(x))  # [n, experts]
    return (moe.expert_hidden(x) * weights.unsqueeze(-1)).flatten(-2)


def _down(expert: nn.Module) -> Tensor:
    return expert.get_submodule("down_proj").get_parameter("weight")
