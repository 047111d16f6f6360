"""The vision_config of config.json: Qwen2-VL's keys, and Qwen2.5-VL's, which call the same widths otherwise."""

from typing import Any

import msgspec

from sonoedge.export.models.config import VisionConfig, WindowConfig

# Qwen2.5-VL's name of a size, and ours, which is Qwen2-VL's
RENAMED = {"hidden_size": "embed_dim", "out_hidden_size": "hidden_size"}
ACTIVATION = "quick_gelu"
WINDOWED_ACTIVATION = "silu"
DEFAULT_WIDTH = {"embed_dim": 3584}  # transformers' Qwen2_5_VLVisionConfig differs from Qwen2VLVisionConfig in this


def vision_fields(vision: dict[str, Any], *, windowed: bool) -> dict[str, Any]:
    """The fields of a VisionConfig from a vision_config; msgspec.ValidationError names a wrong key of the windows."""
    if not windowed:
        return {key: value for key, value in vision.items() if key != "windows"}
    kept = {key: value for key, value in vision.items() if key not in RENAMED and key not in RENAMED.values()}
    widths = {ours: vision[theirs] for theirs, ours in RENAMED.items() if theirs in vision}
    return DEFAULT_WIDTH | kept | widths | {"windows": msgspec.convert(vision, WindowConfig)}


def vision_tree(config: VisionConfig) -> dict[str, Any]:
    """The vision_config of `config`, as the released checkpoints have it."""
    tree: dict[str, Any] = msgspec.to_builtins(config)
    windows: dict[str, Any] | None = tree.pop("windows")
    if windows is None:
        return tree | {"hidden_act": ACTIVATION, "model_type": "qwen2_vl"}
    del tree["mlp_ratio"]
    named = {theirs: tree.pop(ours) for theirs, ours in RENAMED.items()}
    return tree | named | windows | {"hidden_act": WINDOWED_ACTIVATION, "model_type": "qwen2_5_vl"}
