"""`inspect` knows a checkpoint from its headers, at the released size too, and refuses what is not whole."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.inspect import inspect_checkpoint, run
from sonoedge.export.models.config import ModelConfig, MoEConfig, VisionConfig
from sonoedge.export.models.config_json import config_tree
from sonoedge.export.models.loading import empty_model

RELEASED = ModelConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    vision=VisionConfig(),
    moe=MoEConfig(num_experts_per_tok=2, moe_intermediate_size=1408, shared_expert_intermediate_size=5632),
)


@pytest.fixture
def released_folder(tmp_path: Path) -> Path:
    """The released sizes in three bfloat16 shards that are holes but for their headers."""
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(config_tree(RELEASED)))
    shapes = {key: list(tensor.shape) for key, tensor in empty_model(RELEASED).state_dict().items()}
    weight_map = {key: f"model-{index % 3}.safetensors" for index, key in enumerate(shapes)}
    for name in set(weight_map.values()):
        header: dict[str, Any] = {}
        end = 0
        for key in (key for key in shapes if weight_map[key] == name):
            start, end = end, end + 2 * _product(shapes[key])
            header[key] = {"dtype": "BF16", "shape": shapes[key], "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(struct.pack("<Q", len(encoded)) + encoded)
            file.truncate(8 + len(encoded) + end)
    (tmp_path / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"weight_map": weight_map}))
    return tmp_path


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def test_released_size_needs_no_weights(released_folder: Path) -> None:
    inspection = inspect_checkpoint(released_folder)
    assert inspection.architecture == "Qwen2VLMOEForConditionalGeneration"
    assert 11.6e9 < inspection.parameters < 11.8e9
    assert inspection.weight_bytes == 2 * inspection.parameters
    assert inspection.parameters - inspection.active_parameters == 28 * 2 * 3 * 3584 * 1408
    assert inspection.parameters < inspection.int8_bytes < 1.01 * inspection.parameters
    assert (inspection.experts, inspection.experts_per_token, inspection.files) == (4, 2, 3)
    assert inspection.dtype == "BF16"
    fits = {fit.profile: fit.fits for fit in inspection.profiles}
    assert (fits["jetson-agx-orin-64gb"], fits["jetson-orin-nano-8gb"]) == (True, False)
    assert fits["cpu-x86-64"] is None


def test_json_is_the_last_line(golden_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(golden_folder / "echovlm_tiny", as_json=True) == 0
    report = msgspec.json.decode(capsys.readouterr().out.splitlines()[-1])
    assert report["parameters"] == 450_502
    assert report["weight_bytes"] == 4 * 450_502
    assert report["vocabulary"] == 512


def test_table_names_what_matters(golden_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(golden_folder / "echovlm_tiny", as_json=False) == 0
    printed = capsys.readouterr().out
    for word in ("Qwen2VLMOEForConditionalGeneration", "4, 2 a token", "F32", "450.5 k", "cpu-x86-64"):
        assert word in printed


def test_dense_checkpoint_has_no_experts(save_variant: Callable[..., Path]) -> None:
    inspection = inspect_checkpoint(save_variant(moe=None, tie_word_embeddings=True))
    assert inspection.architecture == "Qwen2VLForConditionalGeneration"
    assert inspection.active_parameters == inspection.parameters
    assert (inspection.experts, inspection.tied_embeddings) == (0, True)


def test_what_is_not_whole_is_refused(released_folder: Path) -> None:
    (released_folder / "model-1.safetensors").unlink()
    with pytest.raises(SonoEdgeError, match="is missing but"):
        run(released_folder, as_json=True)
