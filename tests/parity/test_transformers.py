"""What transformers itself saves loads here, and what we save loads there, with the same logits."""

# mypy: allow-untyped-calls

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig, VisionConfig, WindowConfig
from sonoedge.export.models.loading import init_model, load_checkpoint, save_checkpoint
from sonoedge.export.models.rope import batch_positions

TEXT: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
}
REST: dict[str, Any] = {
    "image_token_id": 119,
    "video_token_id": 118,
    "vision_start_token_id": 117,
    "vision_end_token_id": 116,
}
PLAIN = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
WINDOWED = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 44,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
THEIRS: dict[str, Any] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, PLAIN),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, WINDOWED),
}
GRIDS = [(1, 4, 4), (1, 2, 6)]
IDS = torch.tensor([[4, 117, 119, 119, 119, 119, 116, 8, 117, 119, 119, 119, 116, 9, 10]])


@torch.inference_mode()
def distance(folder: Path) -> float:
    """Largest difference in logits between the two implementations of one folder."""
    torch.manual_seed(0)
    patches = torch.randn(28, 1176)
    theirs: Any = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    wanted = theirs(input_ids=IDS, pixel_values=patches, image_grid_thw=torch.tensor(GRIDS)).logits
    ours = load_checkpoint(folder)
    positions, _ = batch_positions(IDS, torch.ones_like(IDS), GRIDS, ours.config)
    found = ours(IDS, positions, image_embeds=ours.encode_images(patches, GRIDS)).logits
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", THEIRS)
def test_what_transformers_saves_loads_here(tmp_path: Path, kind: str, tied: bool, nested: bool) -> None:
    torch.manual_seed(1)
    text = TEXT | {"tie_word_embeddings": tied}
    config_type, model_type, vision = THEIRS[kind]
    config = config_type(vision_config=vision, **REST, **({"text_config": text} if nested else text))
    model_type(config).save_pretrained(tmp_path)
    assert distance(tmp_path) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("windows", [None, WindowConfig(44, 56, (1,), tokens_per_second=2)])
def test_what_we_save_loads_there(tmp_path: Path, tied: bool, windows: WindowConfig | None) -> None:
    config = ModelConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(2, 3, 3),
        image_token_id=119,
        video_token_id=118,
        vision_start_token_id=117,
        vision_end_token_id=116,
        vision=VisionConfig(depth=2, embed_dim=32, hidden_size=64, num_heads=2, windows=windows),
        tie_word_embeddings=tied,
    )
    save_checkpoint(init_model(config, seed=2), tmp_path / "out")
    assert distance(tmp_path / "out") < 1e-5
    read: Any = AutoConfig.from_pretrained(tmp_path / "out")
    assert read.model_type == ("qwen2_vl" if windows is None else "qwen2_5_vl")
    assert windows is None or read.vision_config.tokens_per_second == 2


def test_a_qwen25_keeps_what_the_other_tower_calls_the_same(tmp_path: Path) -> None:
    """Its widths have other names, and one of ours is the other's: neither is mistaken for the other."""
    config_type, model_type, vision = THEIRS["qwen2_5_vl"]
    model_type(config_type(vision_config=vision, text_config=TEXT, **REST)).save_pretrained(tmp_path)
    read = load_checkpoint(tmp_path).config
    assert (read.vision.embed_dim, read.vision.hidden_size, read.vision.mlp_size) == (32, 64, 44)
    assert read.vision.windows == WindowConfig(44, 56, (1,))
    assert [read.vision.attends_fully(block) for block in range(2)] == [False, True]


@pytest.mark.parametrize(("token", "frames", "words"), [(118, 1, "video_token_id 118"), (119, 2, "has 2 frames")])
def test_video_is_refused(tmp_path: Path, token: int, frames: int, words: str) -> None:
    config_type, model_type, vision = THEIRS["qwen2_5_vl"]
    model_type(config_type(vision_config=vision, text_config=TEXT, **REST)).save_pretrained(tmp_path)
    ours, grids = load_checkpoint(tmp_path), [(frames, 4, 4)]
    ids = torch.tensor([[4, 117, *[token] * 4 * frames, 116]])
    with pytest.raises(SonoEdgeError, match=words):
        batch_positions(ids, torch.ones_like(ids), grids, ours.config)
    if frames > 1:
        with pytest.raises(SonoEdgeError, match=words):
            ours.encode_images(torch.zeros(32, 1176), grids)
