"""Tiny teachers of more layers, heads and KV groups than elsewhere, and what they say about a picture and some text."""

from __future__ import annotations

import copy
from collections.abc import Callable

import msgspec
import pytest
import torch
from torch import Tensor

from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model


@pytest.fixture
def teacher_config(small_config: ModelConfig) -> ModelConfig:
    """Six heads of 16 values in two groups, four layers, three vision blocks, four experts."""
    assert small_config.moe is not None
    return msgspec.structs.replace(
        small_config,
        hidden_size=96,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=4,
        vision=msgspec.structs.replace(small_config.vision, depth=3, hidden_size=96),
        moe=msgspec.structs.replace(small_config.moe, num_experts=4),
    )


@pytest.fixture
def made() -> Callable[..., EchoVLM]:
    """Make a random teacher whose norms are not one and whose biases are not zero: `made(config, seed=5)`."""

    def make(config: ModelConfig, seed: int = 5) -> EchoVLM:
        model = init_model(config, seed=seed, std=0.15).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return model

    return make


@pytest.fixture
def teacher(teacher_config: ModelConfig, made: Callable[..., EchoVLM]) -> EchoVLM:
    """A random teacher whose every part matters."""
    return made(teacher_config)


@pytest.fixture
def outputs() -> Callable[..., Tensor]:
    """Logits [9, vocab] for a picture and some text: `outputs(model)`, or of other ids `outputs(model, ids)`."""

    @torch.no_grad()
    def run(model: EchoVLM, ids: Tensor | None = None) -> Tensor:
        model = copy.deepcopy(model)  # weights in a file's memory may lie unaligned, which rounds products another way
        patches = torch.randn(16, 1176, generator=torch.Generator().manual_seed(2))
        if ids is None:
            ids = torch.tensor([[5, 87, *[model.config.image_token_id] * 4, 86, 7, 8]])
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
        found: Tensor = model(ids, positions, image_embeds=model.encode_images(patches, [(1, 4, 4)])).logits[0]
        return found

    return run


@pytest.fixture
def farthest() -> Callable[[Tensor, Tensor], float]:
    """The largest difference, in units of the largest logit."""

    def compare(first: Tensor, second: Tensor) -> float:
        return float((first - second).abs().max() / second.abs().max())

    return compare
