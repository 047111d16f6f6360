"""config.json: both layouts are read, other models are refused in one sentence, and what is written reads back."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig, MoEConfig, WindowConfig
from sonoedge.export.models.config_json import config_tree, parse_config, read_config

DECODER_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "tie_word_embeddings", "eos_token_id",
    "use_sliding_window", "hidden_act",
)  # fmt: skip


@pytest.fixture
def tree(small_config: ModelConfig) -> dict[str, Any]:
    return config_tree(small_config)


def test_recorded_config_is_read(golden_folder: Path) -> None:
    config = read_config(golden_folder / "echovlm_tiny")
    assert config.architecture == "Qwen2VLMOEForConditionalGeneration"
    assert config.moe == MoEConfig(2, 48, 96, 4, norm_topk_prob=False)
    assert (config.hidden_size, config.head_dim, config.mrope_section) == (64, 16, (2, 3, 3))
    assert (config.vision.depth, config.vision.patch_values, config.vision.mlp_size) == (2, 1176, 128)
    assert (config.eos_token_ids, config.pad_token_id) == ((2,), 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("eos", [(), (2,), (2, 3)])
def test_written_config_reads_back(small_config: ModelConfig, tied: bool, dense: bool, eos: tuple[int, ...]) -> None:
    config = msgspec.structs.replace(
        small_config, tie_word_embeddings=tied, moe=None if dense else small_config.moe, eos_token_ids=eos
    )
    tree = msgspec.json.decode(msgspec.json.encode(config_tree(config) | {"something_else": {"kept": 1}}))
    assert parse_config(tree) == config


def test_number_of_experts_falls_back_to_four(tree: dict[str, Any]) -> None:
    del tree["num_experts"]
    config = parse_config(tree)
    assert config.moe is not None
    assert config.moe.num_experts == 4


@pytest.mark.parametrize("rope_key", ["rope_scaling", "rope_parameters"])
def test_nested_layout_means_the_same(tree: dict[str, Any], small_config: ModelConfig, rope_key: str) -> None:
    text = {key: tree.pop(key) for key in DECODER_KEYS} | {"architectures": tree.pop("architectures")}
    rope = text.pop("rope_scaling") | {"rope_type": "default"}
    if rope_key == "rope_parameters":
        rope["rope_theta"] = text.pop("rope_theta")
    tree["text_config"] = text | {"model_type": "qwen2_vl_text", rope_key: rope}
    assert parse_config(tree) == small_config


def test_null_means_absent(tree: dict[str, Any], small_config: ModelConfig) -> None:
    tree |= {"head_dim": None, "layer_types": None, "bos_token_id": None, "num_key_value_heads": None}
    config = parse_config(tree)
    assert config.bos_token_id is None
    assert config.num_key_value_heads == small_config.num_attention_heads


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None}, "architectures None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"vision_config": {"hidden_act": "silu"}}, "vision_config.hidden_act 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}}, "rope type 'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "mrope_section"),
        ({"rope_scaling": "mrope"}, "rope_scaling must be an object"),
        ({"rope_scaling": None}, "mrope_section"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_attention_heads": 5}, "num_attention_heads 5"),
        ({"num_attention_heads": "three"}, "num_attention_heads"),
        ({"num_key_value_heads": 2}, "num_key_value_heads 2"),
        ({"head_dim": 8}, "head_dim 8"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok 6"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size"),
        ({"vision_config": {"hidden_size": 40}}, "hidden_size 40"),
        ({"vision_config": {"hidden_size": 48, "embed_dim": 30, "num_heads": 4}}, "vision_config.num_heads 4"),
        ({"vision_config": {"hidden_size": 48, "embed_dim": 20, "num_heads": 2}}, "multiple of 4"),
        ({"vision_config": []}, "vision_config must be an object"),
    ],
)
def test_other_models_are_refused(tree: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SonoEdgeError) as refusal:
        parse_config(tree | changes)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.fixture
def qwen25(small_config: ModelConfig) -> ModelConfig:
    vision = msgspec.structs.replace(small_config.vision, mlp_ratio=4.0, windows=WindowConfig(44, 56, (1,), 2))
    return msgspec.structs.replace(small_config, moe=None, vision=vision)


@pytest.mark.parametrize("nested", [False, True])
def test_a_qwen25_reads_back_in_both_layouts(qwen25: ModelConfig, nested: bool) -> None:
    tree = msgspec.json.decode(msgspec.json.encode(config_tree(qwen25)))
    assert (tree["model_type"], tree["architectures"]) == ("qwen2_5_vl", ["Qwen2_5_VLForConditionalGeneration"])
    assert tree["vision_config"].keys().isdisjoint({"embed_dim", "mlp_ratio", "windows"})
    if nested:
        text = {key: tree.pop(key) for key in DECODER_KEYS} | {"architectures": tree.pop("architectures")}
        tree["text_config"] = text | {"model_type": "qwen2_5_vl_text", "vision_config": None}
    assert parse_config(tree) == qwen25


def test_a_qwen25_tower_has_its_own_defaults(qwen25: ModelConfig) -> None:
    """Those of transformers where config.json leaves a size out, which Qwen2-VL's tower calls otherwise."""
    tree = config_tree(qwen25) | {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    tree |= {"vision_config": {}, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    vision = parse_config(tree).vision
    assert vision.windows == WindowConfig(3420, 112, (7, 15, 23, 31), 4)
    assert (vision.embed_dim, vision.hidden_size, vision.depth, vision.window_patches) == (3584, 3584, 32, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen2VLForConditionalGeneration"]}, "must be ['Qwen2_5_VLForConditionalGeneration']"),
        ({"model_type": "qwen2_vl"}, "for qwen2_vl"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "vision_config.hidden_act 'quick_gelu'"),
        ({"vision_config": {"window_size": 27}}, "vision_config.window_size 27 holds no merged patch"),
        ({"vision_config": {"window_size": 0}}, "window_size"),
        ({"vision_config": {"window_size": "wide"}}, "window_size"),
        ({"vision_config": {"fullatt_block_indexes": [-1]}}, "fullatt_block_indexes"),
        ({"vision_config": {"intermediate_size": 0}}, "intermediate_size"),
        ({"vision_config": {"out_hidden_size": 40}}, "vision_config.out_hidden_size 40"),
        ({"vision_config": {"num_heads": 3}}, "vision_config.num_heads 3 does not divide vision_config.hidden_size 32"),
        ({"vision_config": {"hidden_size": 20}}, "make hidden_size / num_heads a multiple of 4"),
    ],
)
def test_other_qwen25s_are_refused(qwen25: ModelConfig, changes: dict[str, Any], words: str) -> None:
    tree = config_tree(qwen25)
    for key, change in changes.items():
        tree[key] = tree[key] | change if isinstance(change, dict) else change
    with pytest.raises(SonoEdgeError) as refusal:
        parse_config(tree)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_windows_beside_experts_are_refused(small_config: ModelConfig, qwen25: ModelConfig) -> None:
    with pytest.raises(SonoEdgeError, match="window_size stands beside num_experts"):
        msgspec.structs.replace(qwen25, moe=small_config.moe).check()


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b""])
def test_what_is_not_an_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SonoEdgeError, match="is not a JSON object"):
        read_config(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match="does not exist; give the folder"):
        read_config(tmp_path)
