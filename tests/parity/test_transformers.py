"""What transformers itself saves loads here, and what we save loads there, with the same logits."""

# mypy: allow-untyped-calls

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from sonoedge.export.models.config import ModelConfig, VisionConfig
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
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    "image_token_id": 119,
    "video_token_id": 118,
    "vision_start_token_id": 117,
    "vision_end_token_id": 116,
}
GRIDS = [(1, 4, 4), (1, 2, 6)]
IDS = torch.tensor([[4, 117, 119, 119, 119, 119, 116, 8, 117, 119, 119, 119, 116, 9, 10]])


@torch.inference_mode()
def distance(folder: Path) -> float:
    """Largest difference in logits between the two implementations of one folder."""
    torch.manual_seed(0)
    patches = torch.randn(28, 1176)
    theirs: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    wanted = theirs(input_ids=IDS, pixel_values=patches, image_grid_thw=torch.tensor(GRIDS)).logits
    ours = load_checkpoint(folder)
    positions, _ = batch_positions(IDS, torch.ones_like(IDS), GRIDS, ours.config)
    found = ours(IDS, positions, image_embeds=ours.encode_images(patches, GRIDS)).logits
    return float((found - wanted).abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_what_transformers_saves_loads_here(tmp_path: Path, tied: bool, nested: bool) -> None:
    torch.manual_seed(1)
    text = TEXT | {"tie_word_embeddings": tied}
    config = Qwen2VLConfig(**REST, **({"text_config": text} if nested else text))
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path)
    assert distance(tmp_path) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_what_we_save_loads_there(tmp_path: Path, tied: bool) -> None:
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
        vision=VisionConfig(depth=2, embed_dim=32, hidden_size=64, num_heads=2),
        tie_word_embeddings=tied,
    )
    save_checkpoint(init_model(config, seed=2), tmp_path / "out")
    assert distance(tmp_path / "out") < 1e-5
