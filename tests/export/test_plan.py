"""`plan` reads the sizes of a checkpoint or bundle exactly, and tells what fits, what it costs and what would help."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.device_profiles import load_profile
from sonoedge.device_profiles.shape import weigh
from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig, MoEConfig, VisionConfig, WindowConfig
from sonoedge.export.models.config_json import config_tree, read_config
from sonoedge.export.models.loading import empty_model
from sonoedge.export.plan import run
from sonoedge.export.plan_source import bundle_model, checkpoint_model, shape_of
from sonoedge.export.recipe import load_recipe

PROFILES = Path(load_profile.__code__.co_filename).parent
CONFIGS = Path(run.__code__.co_filename).parent / "configs"
AGX = load_profile("jetson-agx-orin-64gb")
ALIGNMENT_SHARE = 0.02  # of the smallest weights file: every tensor starts at a multiple of 64 bytes


def _small_device(folder: Path, capacity_bytes: int) -> str:
    """A device of one's own with little memory."""
    text = (PROFILES / "jetson-orin-nano-8gb.toml").read_text()
    assert "capacity_bytes = 8_589_934_592" in text
    path = folder / "small.toml"
    text = text.replace("capacity_bytes = 8_589_934_592", f"capacity_bytes = {capacity_bytes}")
    path.write_text(text.replace("system_bytes = 1_170_210_816", "system_bytes = 1_000_000"))
    return str(path)


def _report(out: str) -> dict[str, Any]:
    lines = out.splitlines()
    assert len(lines) == 1
    report: dict[str, Any] = msgspec.json.decode(lines[0])
    return report


@pytest.mark.parametrize("name", ["echovlm-500m", "echovlm-1b", "echovlm-2b", "echovlm-7b"])
def test_parameters_are_counted_exactly(name: str) -> None:
    config = read_config(CONFIGS / f"{name}.json")
    for each in (config, msgspec.structs.replace(config, moe=None, tie_word_embeddings=True)):
        counted = sum(tensor.numel() for tensor in empty_model(each).state_dict().values())
        assert shape_of(each).parameters == counted


@pytest.mark.parametrize(
    ("hidden", "inner", "layers", "heads", "kv_heads", "vocab", "tied", "billions"),
    [(2048, 11008, 36, 16, 2, 151936, True, 3.75), (3584, 18944, 28, 28, 4, 152064, False, 8.29)],
)
def test_parameters_of_a_qwen25_are_counted_exactly(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool, billions: float
) -> None:
    """The sizes of Qwen2.5-VL-3B-Instruct and 7B-Instruct, as their config.json has them."""
    config = msgspec.structs.replace(
        read_config(CONFIGS / "echovlm-7b.json"),
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        moe=None,
        vision=VisionConfig(hidden_size=hidden, windows=WindowConfig()),
    )
    config.check()
    counted = sum(tensor.numel() for tensor in empty_model(config).state_dict().values())
    assert shape_of(config).parameters == counted == pytest.approx(billions * 1e9, rel=0.002)


def test_the_packaged_full_size_is_the_released_one() -> None:
    """The facts of the released checkpoint, so that plans for "echovlm-7b" are plans for it."""
    config = read_config(CONFIGS / "echovlm-7b.json")
    assert config.moe == MoEConfig(
        num_experts_per_tok=2, moe_intermediate_size=1408, shared_expert_intermediate_size=5632, num_experts=4
    )
    assert config.vision == VisionConfig()
    assert shape_of(config).parameters == pytest.approx(11.7e9, rel=0.005)


def test_weights_are_those_that_a_build_lays_out(tiny_checkpoint: Path) -> None:
    model = checkpoint_model(tiny_checkpoint, load_recipe("weight-only"), AGX)
    assert model.weights == weigh(model.shape)


def test_a_scheme_of_the_recipe_changes_what_is_planned(
    tiny_checkpoint: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    quantization = {"default": "w8a16", "graphs": "memory", "schemes": {"lm_head": "float", "visual.": "float"}}
    recipe = load_recipe(write_recipe(tmp_path / "r.toml", quantization=quantization))
    model = checkpoint_model(tiny_checkpoint, recipe, AGX)
    plain = checkpoint_model(tiny_checkpoint, load_recipe("weight-only"), AGX)
    assert model.weights.head == 4 * model.shape.vocab * model.shape.hidden
    assert model.weights.vision > 3 * plain.weights.vision
    assert (model.weights.layers, model.weights.experts) == (plain.weights.layers, plain.weights.experts)
    assert not model.use.int8_products


def test_a_bundle_says_the_same_as_the_checkpoint_that_it_was_made_from(tiny: Any) -> None:
    for profile in (AGX, load_profile("cpu-x86-64")):
        planned, built = (
            checkpoint_model(tiny.checkpoint, load_recipe(tiny.recipe), profile),
            bundle_model(tiny.bundle, profile),
        )
        assert built.shape == planned.shape
        assert built.weights == planned.weights
        assert built.use == planned.use


def test_bytes_are_those_of_the_weights_file(tiny: Any) -> None:
    planned = weigh(bundle_model(tiny.bundle, AGX).shape)
    written = (tiny.bundle / "graphs" / "model.weights").stat().st_size
    assert planned.stored <= written <= (1 + ALIGNMENT_SHARE) * planned.stored


def test_stages_read_what_the_manifest_says(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stages = msgspec.json.decode((tiny.bundle / "manifest.json").read_bytes())["stages"]
    assert run(tiny.bundle, AGX.id, None, None, as_json=True) == 0
    plan = _report(capsys.readouterr().out)["plan"]
    read = {stage["name"]: stage["time"]["work"]["bytes"] for stage in plan["stages"]}
    assert read["vision"] == stages["vision"]["bytes"]
    cache = next(need["bytes"] for need in plan["memory"]["serving"] if need["name"] == "KV cache")
    assert stages["decode"]["bytes"] < read["decode"] < stages["decode"]["bytes"] + 4 * cache
    assert stages["decoder"]["bytes"] < read["prefill"]


def test_a_fitting_model_is_told_in_a_line_of_json(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_checkpoint, AGX.id, None, "MODE_30W", as_json=True) == 0
    report = _report(capsys.readouterr().out)
    plan = report["plan"]
    assert report["fits"] is True
    assert report["verdict"].startswith("It fits: serving takes ")
    assert (plan["profile"], plan["mode"], plan["parameters"]) == (AGX.id, "MODE_30W", 450_502)
    assert report["advice"] is None
    assert report["host_build"]["whole_bytes"] > 9 * 450_502
    assert [stage["name"] for stage in plan["stages"]] == ["vision", "prefill", "hints", "question", "decode"]


def test_a_model_that_does_not_fit_ends_with_status_1(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    device = _small_device(tmp_path, 850_000_000)  # less than the libraries take
    assert run(tiny_checkpoint, device, None, None, as_json=False) == 1
    printed = capsys.readouterr().out
    for words in ("It does not fit: serving takes", "What would help:", "TensorRT's cache update takes 16 bit only"):
        assert words in printed
    assert "no student of this one fits" in printed
    assert run(tiny_checkpoint, device, None, None, as_json=True) == 1
    assert _report(capsys.readouterr().out)["advice"]["student"] is None


def test_a_student_is_advised_as_a_recipe_writes_it(released_sizes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(released_sizes, "jetson-orin-nano-8gb", None, None, as_json=False) == 1
    printed = capsys.readouterr().out
    start = printed.index("[student]")
    student = msgspec.toml.decode("\n".join(line.strip() for line in printed[start:].splitlines()))["student"]
    assert list(student) == [
        "vision_layers",
        "vision_mlp_size",
        "layers",
        "intermediate_size",
        "expert_size",
        "shared_expert_size",
    ]
    assert 1 <= student["layers"] < 28


def test_the_table_says_where_memory_and_time_go(released_sizes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(released_sizes, AGX.id, None, None, as_json=False) == 0
    printed = capsys.readouterr().out
    for words in (
        "11.7 B parameters",
        "mode MAXN",
        "weights of the largest engine, 2 times",
        "one token, context full",
        "A second engine for one token at a time",
        "no tokenizer.json says how long their prompts are",
        "It fits: serving takes 14 GB",
    ):
        assert words in printed
    assert max(map(len, printed.split("Frame to hints")[0].splitlines())) <= 80


def test_a_host_of_unknown_memory_is_no_failure(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_checkpoint, "cpu-x86-64", None, None, as_json=True) == 0
    report = _report(capsys.readouterr().out)
    assert report["fits"] is None
    assert report["verdict"].startswith("Whether it fits cannot be told, since the memory of cpu-x86-64 is unknown")
    assert report["building_bytes"] == 0


def test_what_cannot_be_planned_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, write_recipe: Callable[..., Path], save_variant: Callable[..., Path]
) -> None:
    with pytest.raises(SonoEdgeError, match="has no mode 'turbo': choose MAXN"):
        run(tiny_checkpoint, AGX.id, None, "turbo", as_json=True)
    with pytest.raises(SonoEdgeError, match="unknown profile 'abacus'"):
        run(tiny_checkpoint, "abacus", None, None, as_json=True)
    with pytest.raises(SonoEdgeError, match=r"absent does not exist"):
        run(tmp_path / "absent", AGX.id, None, None, as_json=True)
    recipe = write_recipe(tmp_path / "r.toml", quantization={"default": "w8a8-dynamic"})
    with pytest.raises(SonoEdgeError, match=r"quantization\.default = 'w8a8-dynamic'"):
        run(tiny_checkpoint, AGX.id, str(recipe), None, as_json=True)
    broken = tmp_path / "bundle"
    broken.mkdir()
    (broken / "manifest.json").write_text("{}")
    with pytest.raises(SonoEdgeError, match=r"manifest\.json cannot be read"):
        run(broken, AGX.id, None, None, as_json=True)


def test_a_dense_checkpoint_is_planned_too(
    save_variant: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(save_variant(moe=None, tie_word_embeddings=True), AGX.id, None, None, as_json=True) == 0
    memory = _report(capsys.readouterr().out)["plan"]["memory"]
    assert memory["serving"][0]["name"] == "weights"


@pytest.fixture
def released_sizes(tmp_path: Path) -> Path:
    """The released model as a file that is a hole but for its header."""
    config: ModelConfig = read_config(CONFIGS / "echovlm-7b.json")
    folder = tmp_path / "echovlm"
    folder.mkdir()
    (folder / "config.json").write_bytes(msgspec.json.encode(config_tree(config)))
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in empty_model(config).state_dict().items():
        start, end = end, end + 2 * math.prod(tensor.shape)
        header[key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return folder
