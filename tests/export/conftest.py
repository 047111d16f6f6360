"""Small configurations and folders that the tests of the model definition share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from sonoedge.export.models.config import ModelConfig, MoEConfig, VisionConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint, save_checkpoint
from sonoedge.runtime.tokens import Tokenizer


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for tiny products, which a busy machine runs twenty times faster."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model(tiny_checkpoint: Path) -> EchoVLM:
    """The smallest checkpoint, freshly loaded."""
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_file(tiny_checkpoint / "tokenizer.json")


@pytest.fixture
def small_config() -> ModelConfig:
    """A tiny EchoVLM in which no two sizes are equal."""
    return ModelConfig(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(2, 3, 3),
        image_token_id=89,
        video_token_id=88,
        vision_start_token_id=87,
        vision_end_token_id=86,
        vision=VisionConfig(depth=2, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=3.0),
        moe=MoEConfig(
            num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=5
        ),
        max_position_embeddings=128,
        bos_token_id=1,
        pad_token_id=0,
        eos_token_ids=(2, 3),
    )


@pytest.fixture
def small_model(small_config: ModelConfig, one_thread: None) -> EchoVLM:
    """The tiny EchoVLM with weights large enough that every part matters."""
    return init_model(small_config, seed=5, std=0.15).eval()


@pytest.fixture
def save_variant(small_config: ModelConfig, tmp_path: Path) -> Callable[..., Path]:
    """Save a random checkpoint whose config has the given fields replaced."""

    def save(**fields: object) -> Path:
        config = msgspec.structs.replace(small_config, **fields)
        folder = tmp_path / "saved"
        save_checkpoint(init_model(config, seed=1), folder)
        return folder

    return save
