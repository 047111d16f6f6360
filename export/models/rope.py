"""Rotary embedding: multimodal for the decoder (time, row, column), two-dimensional for the vision tower."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig, VisionConfig

Grid = tuple[int, int, int]  # patches of one image: time, rows, columns
VISION_THETA = 10000.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last axis as pairs; x [..., D], cos and sin broadcastable [..., D / 2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def mrope_tables(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, head_dim / 2] for positions [3, B, S]: each frequency turns with one of time, row or column.

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    width = config.head_dim
    # The exponent is computed on the spot rather than kept in a buffer: it survives bf16 casts and meta weights.
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions.to(torch.float32).unsqueeze(-1) * (1.0 / config.rope_theta**exponent)  # [3, B, S, D / 2]
    sections = angles.split(list(config.mrope_section), dim=-1)
    turned = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)  # [B, S, D / 2]
    return turned.cos().to(dtype), turned.sin().to(dtype)


def vision_tables(grids: Sequence[Grid], config: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """float32 cos and sin [patches, head_dim / 2] for images of these grids: rows turn one half, columns the other."""
    half = config.head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequency = 1.0 / VISION_THETA**exponent  # [head_dim / 4]
    places = torch.cat([patch_places(grid, config.spatial_merge_size, device) for grid in grids])  # [patches, 2]
    angles = (places.to(torch.float32).unsqueeze(-1) * frequency).flatten(1)  # [patches, head_dim / 2]
    return angles.cos(), angles.sin()


def patch_places(grid: Grid, merge: int, device: torch.device) -> Tensor:
    """Row and column of every patch [t * h * w, 2], in the order of the patches: merge blocks stay together."""
    frames, rows, columns = grid
    row = torch.arange(rows, device=device)[:, None].expand(rows, columns)
    column = torch.arange(columns, device=device)[None, :].expand(rows, columns)
    places = torch.stack((row, column), dim=-1)  # [rows, columns, 2]
    blocks = places.reshape(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2)
    return blocks.reshape(-1, 2).repeat(frames, 1)


def require_stills(grids: Sequence[Grid], config: VisionConfig) -> None:
    """Raise SonoEdgeError for a grid of several frames where only videos have one, which Qwen2.5-VL places in time."""
    videos = [grid for grid in grids if grid[0] != 1]
    if config.windows is not None and videos:
        raise SonoEdgeError(
            f"image_grid_thw {list(videos[0])} has {videos[0][0]} frames; videos of Qwen2.5-VL are not supported, so "
            "give each frame as an image."
        )


def batch_positions(
    input_ids: Tensor, attention_mask: Tensor, grids: Sequence[Grid], config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Positions (time, row, column) of a padded batch, and the position of each row's next token.

    input_ids and attention_mask [B, S]; grids of all images in reading order; gives int64 [3, B, S] (1 at padding) and
    int64 [B]. SonoEdgeError when images in the text and grids do not match. Source: transformers' `get_rope_index`.
    """
    require_stills(grids, config.vision)
    if bool((input_ids == config.video_token_id).any()):
        raise SonoEdgeError(
            f"the text holds video_token_id {config.video_token_id}; videos are not supported, so give their frames as "
            "images."
        )
    positions = torch.ones((3, *input_ids.shape), dtype=torch.int64, device=input_ids.device)
    following = torch.zeros(input_ids.shape[0], dtype=torch.int64, device=input_ids.device)
    remaining = list(grids)
    for row, (ids, mask) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
        tokens: list[int] = ids[mask].tolist()
        place = _row_positions(tokens, remaining, config)
        positions[:, row, mask] = place.to(input_ids.device)
        following[row] = int(place.max()) + 1 if tokens else 0
    if remaining:
        raise SonoEdgeError(
            f"{len(grids)} images are given but {len(remaining)} of them have no place in the text; check both."
        )
    return positions, following


def _row_positions(tokens: list[int], remaining: list[Grid], config: ModelConfig) -> Tensor:
    """Positions [3, n] of one unpadded sequence; takes the grids of its images from the front of `remaining`."""
    merge = config.vision.spatial_merge_size
    opening = (config.vision_start_token_id, config.image_token_id)
    images = sum(pair == opening for pair in pairwise(tokens))
    if images > len(remaining):
        raise SonoEdgeError(f"the text has more images than grids: {images} against {len(remaining)}; check both.")
    parts: list[Tensor] = []
    start, position = 0, 0
    for _ in range(images):
        frames, rows, columns = remaining.pop(0)
        begin = tokens.index(config.image_token_id, start)
        size = (frames, rows // merge, columns // merge)
        merged = size[0] * size[1] * size[2]
        parts.append(torch.arange(position, position + begin - start).expand(3, -1))
        position += begin - start
        parts.append(torch.stack(torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")).flatten(1) + position)
        position += max(size)
        start = begin + merged
        if start > len(tokens):
            raise SonoEdgeError(
                f"an image of {merged} tokens starts at token {begin} of {len(tokens)}; the text must hold all of them."
            )
    parts.append(torch.arange(position, position + len(tokens) - start).expand(3, -1))
    return torch.cat(parts, dim=1)
