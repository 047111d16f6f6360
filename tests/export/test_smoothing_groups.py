"""Whatever factors SmoothQuant moves, the model computes the same: random factors in every group at once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sonoedge.calibration.smoothing import Smoothing
from sonoedge.export.models.config import ModelConfig, VisionConfig, WindowConfig
from sonoedge.export.models.echovlm import EchoVLM, ModelOutput
from sonoedge.export.models.loading import empty_model, init_model, open_checkpoint
from sonoedge.export.models.rope import Grid, batch_positions
from sonoedge.export.smoothing_groups import Factors, SmoothingGroup, smoothing_groups

GRIDS: list[Grid] = [(1, 4, 2), (1, 2, 6)]
BOUND = 1e-5  # of the largest logit
NEVER_CONSUMED = ("patch_embed.proj", "mlp.fc2", "merger.mlp.2")  # of the products: a nonlinearity stands before them


def random_smoothing(config: ModelConfig, seed: int) -> Smoothing:
    """Factors between 1/8 and 8 for every channel of every group."""
    generator = torch.Generator().manual_seed(seed)
    factors = Factors({}, {})
    for group in all_groups(config):
        factors.add(group, torch.exp2(6 * torch.rand(group.channels, generator=generator) - 3))
    return Smoothing(factors.rows, factors.columns)


def all_groups(config: ModelConfig) -> list[SmoothingGroup]:
    return [group for groups in smoothing_groups(config).values() for group in groups]


def random_model(config: ModelConfig, dtype: torch.dtype) -> EchoVLM:
    model = init_model(config, seed=2, std=0.2).to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


@torch.no_grad()
def smooth(model: EchoVLM, smoothing: Smoothing) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(smoothing.apply(name, parameter))


@torch.no_grad()
def run(model: EchoVLM) -> ModelOutput:
    config = model.config
    generator = torch.Generator().manual_seed(4)
    image = [[config.vision_start_token_id, *[config.image_token_id] * n, config.vision_end_token_id] for n in (2, 3)]
    ids = torch.tensor([[5, *image[0], 7, *image[1], 9, 11, 4]])
    patches = torch.randn(20, config.vision.patch_values, generator=generator).to(model.model.norm.weight.dtype)
    positions, _ = batch_positions(ids, torch.ones_like(ids), GRIDS, config)
    embeds = model.encode_images(patches, GRIDS)
    return model(ids, positions, image_embeds=embeds, collect_router=True, collect_hidden=True)  # type: ignore[no-any-return]


def windowed(vision: VisionConfig) -> VisionConfig:
    """The tower as Qwen2.5-VL has it: gated feed-forwards, norms without biases."""
    return msgspec.structs.replace(vision, windows=WindowConfig(44, 56, (1,)))


def variant(config: ModelConfig, name: str) -> ModelConfig:
    """Shapes in which every index of a channel matters."""
    grouped: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "mrope_section": (1, 1, 2)}
    changes: dict[str, dict[str, Any]] = {
        "echovlm": {},
        "grouped heads": grouped,
        "dense": {"moe": None} | grouped,
        "tied": {"tie_word_embeddings": True},
        "windows": {"moe": None, "vision": windowed(config.vision)} | grouped,
    }
    return msgspec.structs.replace(config, **changes[name])


@pytest.mark.parametrize("name", ["echovlm", "grouped heads", "dense", "tied", "windows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smoothed_model_computes_the_same(
    small_config: ModelConfig, name: str, dtype: torch.dtype, one_thread: None
) -> None:
    config = variant(small_config, name)
    model = random_model(config, dtype)
    expected = run(model)
    smoothing = random_smoothing(config, seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    smooth(model, smoothing)
    found = run(model)
    scale = float(expected.logits.abs().max())
    error = float((found.logits - expected.logits).abs().max()) / scale
    routers = zip(found.router_logits or (), expected.router_logits or (), strict=True)
    router_error = max((float((a - b).abs().max() / b.abs().max()) for a, b in routers), default=0.0)
    print(f"{name} {dtype}: logits {error:.1e}, routers {router_error:.1e}")
    assert error < BOUND
    assert router_error < BOUND
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {*smoothing.row_factors, *smoothing.column_factors}


def test_keys_and_sizes_are_a_checkpoints(
    small_config: ModelConfig, save_variant: Callable[..., Path], one_thread: None
) -> None:
    config, headers = open_checkpoint(save_variant())
    smoothing = random_smoothing(config, seed=0)
    for key, factors in smoothing.row_factors.items():
        assert factors.shape == (headers[key].shape[0],), key
    for key, factors in smoothing.column_factors.items():
        assert factors.shape == (headers[key].shape[1],), key


@pytest.mark.parametrize("tied", [False, True])
def test_every_product_that_can_be_smoothed_is_read_in_one_group(small_config: ModelConfig, tied: bool) -> None:
    config = msgspec.structs.replace(small_config, tie_word_embeddings=tied)
    matrices = {key for key, tensor in empty_model(config).state_dict().items() if tensor.dim() > 1}
    matrices -= {"model.embed_tokens.weight"}
    read = [key for group in all_groups(config) for key in (*group.consumers, *group.float_consumers)]
    assert len(read) == len(set(read))
    assert matrices - set(read) == {key for key in matrices if key.removesuffix(".weight").endswith(NEVER_CONSUMED)}


def test_channels_of_columns() -> None:
    grouped = SmoothingGroup("v", 4, (), (), repeats=3, block=2)  # two heads of two channels, three query heads each
    assert grouped.channel.tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    merged = SmoothingGroup("n", 3, (), (), repeats=2)
    assert merged.channel.tolist() == [0, 1, 2, 0, 1, 2]


def test_widths_of_the_released_model() -> None:
    config = ModelConfig(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=1,
        num_attention_heads=28,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        image_token_id=151655,
        video_token_id=151656,
        vision_start_token_id=151652,
        vision_end_token_id=151653,
        vision=VisionConfig(depth=1),
    )
    groups = {group.name: group for group in all_groups(config)}
    assert groups["model.layers.0.self_attn.v_proj"].channel.shape == (3584,)
    assert groups["model.layers.0.self_attn.v_proj"].channels == 512
    assert groups["visual.merger.ln_q"].channel.shape == (5120,)
