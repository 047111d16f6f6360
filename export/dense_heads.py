"""What every patch shows, as a training target: the labels that teach a small vision tower to see lesions at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.calibration.phantom import REGIONS
from sonoedge.calibration.pool import LESION_CLASSES, LabelledFrame
from sonoedge.export.models.echovlm import EchoVLM

QUALITIES = ("good", "poor")


class DenseHeads(nn.Module):
    """Linear probes on the vision tower, used in training only and thrown away afterwards."""

    def __init__(self, vision_width: int, hidden: int) -> None:
        super().__init__()
        self.patch = nn.Linear(vision_width, LESION_CLASSES)
        self.merged = nn.Linear(hidden, LESION_CLASSES)
        self.region = nn.Linear(hidden, len(REGIONS))
        self.quality = nn.Linear(hidden, len(QUALITIES))

    def forward(self, patch_features: Tensor, image_embeds: Tensor, frames: Sequence[LabelledFrame]) -> Tensor:
        """The mean loss of all four probes for B frames.

        patch_features [B·patches, vision_width] in merge-block order, image_embeds [B·merged, hidden].
        """
        batch = len(frames)
        per_patch, per_merged = _targets(frames)  # int64 [B·patches], [B·merged]
        pooled = image_embeds.view(batch, -1, image_embeds.shape[-1]).mean(1)  # [B, hidden]
        region = torch.tensor([REGIONS.index(frame.truth.region) for frame in frames])
        quality = torch.tensor([QUALITIES.index(frame.truth.quality) for frame in frames])
        # Lesions cover a few patches of a hundred: weighted up, or "nothing anywhere" would be a good answer.
        weight = torch.tensor([1.0] + [4.0] * (LESION_CLASSES - 1))
        return (
            functional.cross_entropy(self.patch(patch_features), per_patch, weight=weight)
            + functional.cross_entropy(self.merged(image_embeds), per_merged, weight=weight)
            + 0.5 * functional.cross_entropy(self.region(pooled), region)
            + 0.5 * functional.cross_entropy(self.quality(pooled), quality)
        )


class VisionTap:
    """Runs the vision tower and keeps what its last block gave, before the patches are merged."""

    def __init__(self, model: EchoVLM) -> None:
        self._model = model
        self._features: Tensor | None = None
        model.visual.merger.register_forward_pre_hook(self._keep)

    def _keep(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def encode(self, patches: Tensor, grids: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
        """Patch features [patches, vision_width] and image embeddings [merged, hidden]."""
        embeds = self._model.encode_images(patches, grids)
        assert self._features is not None  # the hook runs inside encode_images
        return self._features, embeds


def _targets(frames: Sequence[LabelledFrame]) -> tuple[Tensor, Tensor]:
    classes = np.stack([frame.lesion_classes for frame in frames])  # [B, G, G]
    batch, grid, _ = classes.shape
    blocks = classes.reshape(batch, grid // 2, 2, grid // 2, 2).transpose(0, 1, 3, 2, 4)  # merge-block order
    blocks = blocks.reshape(batch * (grid // 2) ** 2, 4)
    per_patch = torch.from_numpy(blocks.reshape(-1).astype(np.int64))
    return per_patch, torch.from_numpy(blocks.max(1).astype(np.int64))
