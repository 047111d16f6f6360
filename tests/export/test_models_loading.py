"""Loading refuses what does not fit exactly, and saving writes a whole folder or none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint, save_checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(save_variant: Callable[..., Path]) -> Path:
    return save_variant()


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path) -> str:
    with pytest.raises(SonoEdgeError) as refused:
        load_checkpoint(folder)
    message = str(refused.value)
    assert "\n" not in message
    return message


def shard(folder: Path, parts: int) -> dict[str, str]:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {key: f"model-{index % parts}.safetensors" for index, key in enumerate(tensors)}
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, folder / name)
    (folder / INDEX).write_bytes(msgspec.json.encode({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_loads_equal(small_config: ModelConfig, tmp_path: Path, dense: bool, tied: bool) -> None:
    config = msgspec.structs.replace(small_config, tie_word_embeddings=tied, moe=None if dense else small_config.moe)
    model = init_model(config, seed=3)
    save_checkpoint(model, tmp_path / "out", extra_config={"note": "kept"})
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert ("lm_head.weight" in loaded.state_dict()) != tied
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[key])
    with safe_open(tmp_path / "out" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert msgspec.json.decode((tmp_path / "out" / "config.json").read_bytes())["note"] == "kept"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"]


def test_seed_decides_weights(small_config: ModelConfig) -> None:
    first, again, other = (init_model(small_config, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert all(bool(tensor.isfinite().all()) for tensor in first.values())


def test_weights_take_the_asked_type(folder: Path) -> None:
    model = load_checkpoint(folder, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_saved_bfloat16_loads_as_float32(small_model: EchoVLM, tmp_path: Path) -> None:
    save_checkpoint(small_model, tmp_path / "out", dtype=torch.bfloat16)
    loaded = load_checkpoint(tmp_path / "out").state_dict()
    for key, tensor in small_model.state_dict().items():
        assert torch.equal(tensor.bfloat16().float(), loaded[key])


def test_shards_load(folder: Path) -> None:
    whole = load_checkpoint(folder).state_dict()
    shard(folder, 3)
    parts = load_checkpoint(folder).state_dict()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_missing_shard_is_named(folder: Path) -> None:
    shard(folder, 3)
    (folder / "model-1.safetensors").unlink()
    assert "model-1.safetensors is missing" in refusal(folder)


def test_index_that_disagrees_is_refused(folder: Path) -> None:
    weight_map = shard(folder, 2)
    weight_map["model.norm.weight"] = f"model-{1 - int(weight_map['model.norm.weight'][6])}.safetensors"
    (folder / INDEX).write_bytes(msgspec.json.encode({"weight_map": weight_map}))
    assert "disagree about model.norm.weight" in refusal(folder)


@pytest.mark.parametrize("name", ["../model-0.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_index_stays_in_its_folder(folder: Path, name: str) -> None:
    weight_map = shard(folder, 1)
    weight_map["model.norm.weight"] = name
    (folder / INDEX).write_bytes(msgspec.json.encode({"weight_map": weight_map}))
    assert "not a file of this folder" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"weight_map": [1]}'])
def test_broken_index_is_named(folder: Path, content: bytes) -> None:
    shard(folder, 1)
    (folder / INDEX).write_bytes(content)
    assert "not a shard index" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000])
def test_truncated_file_is_named(folder: Path, kept: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])
    assert "model.safetensors is not a whole safetensors file" in refusal(folder)


def test_unused_keys_are_listed(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({f"extra.{index:02}": torch.zeros(1) for index in range(11)}))
    message = refusal(folder)
    assert "11 unused" in message
    assert "extra.07 and 3 more" in message
    assert "extra.08" not in message


def test_missing_keys_are_listed(folder: Path) -> None:
    rewrite(
        folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".moe." in key or "coefficient" in key]
    )
    message = refusal(folder)
    assert "missing (model.layers.0.coefficient.bias, " in message
    assert " more)" in message


def test_dense_config_over_expert_weights_is_refused(folder: Path) -> None:
    tree = msgspec.json.decode((folder / "config.json").read_bytes())
    tree["architectures"] = ["Qwen2VLForConditionalGeneration"]
    (folder / "config.json").write_bytes(msgspec.json.encode(tree))
    assert "unused (model.layers.0.coefficient.bias" in refusal(folder)


def test_head_beside_tied_embeddings_is_unused(save_variant: Callable[..., Path]) -> None:
    folder = save_variant(tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "1 unused (lm_head.weight)" in refusal(folder)


def test_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))
    assert "model.norm.weight [7], not [48]" in refusal(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    assert "model.norm.weight is I8" in refusal(folder)


def test_folder_without_weights_is_named(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "holds neither model.safetensors nor" in refusal(folder)


def test_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")


def test_file_instead_of_a_folder_is_named(folder: Path) -> None:
    assert "is not a folder" in refusal(folder / "config.json")


def test_save_refuses_a_filled_folder(small_model: EchoVLM, folder: Path) -> None:
    before = (folder / "config.json").read_bytes()
    with pytest.raises(SonoEdgeError, match="not an empty folder"):
        save_checkpoint(small_model, folder)
    assert (folder / "config.json").read_bytes() == before


def test_save_fills_an_empty_folder(small_model: EchoVLM, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    save_checkpoint(small_model, tmp_path / "out")
    names = {"config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_failed_save_leaves_nothing(small_model: EchoVLM, tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"tokenizer.json does not exist"):
        save_checkpoint(small_model, tmp_path / "out", tokenizer_files_from=tmp_path / "source")
    assert list(tmp_path.iterdir()) == []


def test_settings_are_copied_and_overridden(small_model: EchoVLM, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text('{"name": 1}')
    (source / "preprocessor_config.json").write_text('{"min_pixels": 784, "max_pixels": 1568}')
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.1}')
    save_checkpoint(small_model, tmp_path / "out", tokenizer_files_from=source, preprocessor={"max_pixels": 3136})
    image = msgspec.json.decode((tmp_path / "out" / "preprocessor_config.json").read_bytes())
    assert (image["min_pixels"], image["max_pixels"], image["merge_size"]) == (784, 3136, 2)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"name": 1}'
    generation = msgspec.json.decode((tmp_path / "out" / "generation_config.json").read_bytes())
    assert generation == {"eos_token_id": [2, 3], "temperature": 0.1}
