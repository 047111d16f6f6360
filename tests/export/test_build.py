"""`sonoedge build` on the smallest checkpoint: what the bundle holds, and what is refused leaves nothing behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import onnx
import pytest
import torch

from sonoedge.bundle import HINT_SCHEMA_FILE, TOKENIZER_FILE, open_bundle
from sonoedge.calibration.ranges import RangeTable
from sonoedge.export import build, bundle_graphs
from sonoedge.export.lowering import Scheme
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint, save_checkpoint
from sonoedge.export.quantize import plan
from sonoedge.export.recipe import Quantization, load_recipe
from sonoedge.runtime import hints
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.golden import GoldenCase
from sonoedge.runtime.model import open_model


@pytest.fixture
def quick(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of the same checkpoint take the graphs that were exported for the first one."""
    monkeypatch.setattr(bundle_graphs, "export_vision", lambda _model: tiny.marked["vision"].clone())
    monkeypatch.setattr(
        bundle_graphs, "export_decoder", lambda _model, kind, _context: tiny.marked[kind.name.lower()].clone()
    )


FEW: dict[str, dict[str, Any]] = {"calibration": {"frames": 4, "least_expert_tokens": 1}, "hints": {"frames": 8}}


@pytest.fixture
def few(write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for builds that end early: hardly any frame is rendered."""
    return write_recipe(tmp_path_factory.mktemp("few") / "recipe.toml", **FEW)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_bundle_holds_what_it_says(tiny: Any) -> None:
    bundle = open_bundle(tiny.bundle)
    manifest = bundle.manifest
    recipe = load_recipe(tiny.recipe)
    assert manifest.profile == "cpu-x86-64"
    assert manifest.hashes.recipe == recipe.sha256
    assert manifest.model.name == "checkpoint"
    assert manifest.model.id == tiny.report["model"]
    assert manifest.model.parameters == sum(p.numel() for p in load_checkpoint(tiny.checkpoint).parameters())
    assert manifest.decoder.context == recipe.limits.context
    assert manifest.image.max_pixels == 84 * 84
    assert set(manifest.toolchain) >= {"torch", "onnx", "onnxruntime", "numpy"}
    table = msgspec.json.decode(bundle.path("calibration.json").read_bytes(), type=RangeTable)
    assert table.frames == recipe.calibration.frames
    assert table.sha256 == manifest.hashes.calibration
    assert all(min(tokens) >= recipe.calibration.least_expert_tokens for tokens in table.expert_tokens.values())
    assert set(manifest.hint_calibration) == {"region", "quality", "finding", "kind", "side"}
    assert manifest.golden.bound >= 0.02
    assert tiny.report["golden_error"] < manifest.golden.bound
    assert tiny.report["quantized_share"] == 1.0
    for name in (TOKENIZER_FILE, HINT_SCHEMA_FILE, "familiarity.npz", "golden/0.npz", "golden/1.npz"):
        assert bundle.path(name).is_file()
    packaged = Path(str(hints.__file__)).parent / HINT_SCHEMA_FILE
    assert bundle.path(HINT_SCHEMA_FILE).read_bytes() == packaged.read_bytes()


def test_both_decoders_share_their_weights_and_are_valid(tiny: Any) -> None:
    bundle = open_bundle(tiny.bundle)
    for formulation in ("ort", "qdq"):
        path = bundle.graph("decoder", formulation)
        model = onnx.load(path, load_external_data=False)
        held = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert held == {bundle_graphs.WEIGHTS}
        large = [t.name for t in model.graph.initializer if len(t.raw_data) > bundle_graphs.EXTERNAL_BYTES]
        assert large == [], "a second copy of the weights"
        custom = {node.domain for node in model.graph.node} - {"", "sonoedge"}
        assert custom == ({"com.microsoft"} if formulation == "ort" else set())
        if formulation == "qdq":
            onnx.checker.check_model(str(path))
    assert bundle.manifest.stages["decoder"].bytes is not None


def test_a_built_bundle_gives_hints(tiny: Any) -> None:
    model = open_model(tiny.bundle)
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    said = model.engine.hints(Frame(picture, 0, 0, None, "test"))
    assert [hint.hint for hint in said][:3] == ["region", "quality", "finding"]
    assert all(sum(hint.candidates.values()) == pytest.approx(1) for hint in said)
    assert "not for diagnosis" in model.intended_use
    model.session.close()


def test_conversations_calibrate_too(
    tiny: Any, quick: None, tmp_path: Path, write_recipe: Callable[..., Path], sonoedge: Any
) -> None:
    """Without known truth hints stay uncalibrated; the scheme follows the recipe; a profile's path is its id's."""
    entries = []
    for number in range(3):
        picture = np.random.default_rng(number).integers(0, 255, (60 + 30 * number, 90, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"{number}.png"), picture)
        turns = [
            {"from": "human", "value": "<image>Which region is shown?"},
            {"from": "gpt", "value": "liver"},
            {"from": "human", "value": "Is a lesion visible?"},
            {"from": "gpt", "value": "no"},
        ]
        entries.append({"id": f"case {number}", "image": [f"{number}.png"], "conversations": turns})
    (tmp_path / "cases.json").write_bytes(msgspec.json.encode(entries))
    recipe = write_recipe(
        tmp_path / "recipe.toml",
        calibration={"frames": 3, "least_expert_tokens": 1},
        limits={"golden_cases": 9},
        quantization={"float": ["visual", "lm_head"]},
    )
    profile = Path(build.__file__).parents[1] / "device_profiles" / "cpu-aarch64.toml"
    out = tmp_path / "deep" / "bundle"
    ran = sonoedge(
        "build", tiny.checkpoint, "--profile", profile, "--recipe", recipe,
        "--calibration", tmp_path / "cases.json", "--out", out,
    )  # fmt: skip
    assert ran.status == 0, ran.err
    assert "profile cpu-aarch64" in ran.out
    bundle = open_bundle(out)
    assert bundle.manifest.profile == "cpu-aarch64"
    assert bundle.manifest.hint_calibration == {}
    assert bundle.manifest.familiarity is None
    assert sum(name.startswith("golden/") for name in bundle.manifest.files) == 3
    vision = onnx.load(bundle.graph("vision", "ort"))
    assert not any(node.op_type == "QuantizeLinear" for node in vision.graph.node)
    assert left_in(out.parent) == ["bundle"]


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown profile": ({"profile": "pocket-calculator"}, "unknown profile 'pocket-calculator': choose cpu-"),
    "unknown recipe": ({"recipe": "slow"}, "unknown recipe 'slow': choose demo"),
    "no checkpoint": ({"checkpoint": "/nowhere"}, "/nowhere does not exist"),
    "no data": ({"calibration": "/nowhere.json"}, "/nowhere.json cannot be read"),
}


@pytest.mark.parametrize(("changed", "words"), REFUSALS.values(), ids=REFUSALS)
def test_what_is_not_there_is_refused_at_once(
    tiny: Any, tmp_path: Path, sonoedge: Any, changed: dict[str, Any], words: str
) -> None:
    given = {
        "checkpoint": tiny.checkpoint, "profile": "cpu-x86-64", "recipe": tiny.recipe, "calibration": "phantoms",
    } | changed  # fmt: skip
    ran = sonoedge(
        "build", given["checkpoint"], "--profile", given["profile"], "--recipe", given["recipe"],
        "--calibration", given["calibration"], "--out", tmp_path / "bundle", "--json",
    )  # fmt: skip
    assert ran.status == 2
    assert words in ran.err
    assert "render" not in ran.err
    assert msgspec.json.decode(ran.last_line) == {"error": ran.err.removeprefix("sonoedge: error: ").strip()}
    assert left_in(tmp_path) == []


def test_a_checkpoint_without_tokenizer_is_refused_at_once(tiny: Any, tmp_path: Path, sonoedge: Any) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny.checkpoint, checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    ran = sonoedge(
        "build", checkpoint, "--profile", "cpu-x86-64", "--recipe", tiny.recipe, "--calibration", "phantoms",
        "--out", tmp_path / "bundle",
    )  # fmt: skip
    assert ran.status == 2
    assert "there is no tokenizer at" in ran.err
    assert "render" not in ran.err
    assert left_in(tmp_path) == ["checkpoint"]


def test_an_existing_folder_is_left_alone(tiny: Any, tmp_path: Path, sonoedge: Any) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "mine").write_text("kept")
    ran = sonoedge(
        "build", tiny.checkpoint, "--profile", "cpu-x86-64", "--recipe", tiny.recipe, "--calibration", "phantoms",
        "--out", tmp_path / "bundle",
    )  # fmt: skip
    assert ran.status == 2
    assert "bundle exists: remove it" in ran.err
    assert (tmp_path / "bundle" / "mine").read_text() == "kept"


LATE_REFUSALS: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "an expert with too few tokens": (
        {"calibration": {"frames": 1, "least_expert_tokens": 100_000}},
        r"calibration gave model.layers.0.moe.experts.0 only",
    ),
    "too few frames for familiarity": ({"hints": {"frames": 12}}, "hints.frames = 12: "),
    "a context that the questions do not fit": ({"limits": {"context": 40}}, "limits.context = 40"),
    "a float name without product": ({"quantization": {"float": ["visul"]}}, "quantization.float names 'visul'"),
}


@pytest.mark.parametrize(("sections", "words"), LATE_REFUSALS.values(), ids=LATE_REFUSALS)
def test_what_turns_out_late_leaves_nothing_behind(
    tiny: Any, quick: None, tmp_path: Path, write_recipe: Callable[..., Path], sonoedge: Any,
    sections: dict[str, dict[str, Any]], words: str,
) -> None:  # fmt: skip
    merged = {name: FEW.get(name, {}) | sections.get(name, {}) for name in {*FEW, *sections}}
    recipe = write_recipe(tmp_path / "recipe.toml", **merged)
    ran = sonoedge(
        "build", tiny.checkpoint, "--profile", "cpu-x86-64", "--recipe", recipe, "--calibration", "phantoms",
        "--out", tmp_path / "new" / "bundle",
    )  # fmt: skip
    assert ran.status == 2, ran.err
    assert words in ran.err
    assert left_in(tmp_path) == ["recipe.toml"]


def test_weights_that_are_not_numbers_are_refused(
    tiny: Any, quick: None, few: Path, tmp_path: Path, sonoedge: Any
) -> None:
    model = load_checkpoint(tiny.checkpoint)
    with torch.no_grad():
        model.visual.blocks[1].get_parameter("mlp.fc1.weight")[3, 3] = float("nan")
    shutil.copyfile(tiny.checkpoint / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    save_checkpoint(model, tmp_path / "checkpoint", tokenizer_files_from=tmp_path)
    ran = sonoedge(
        "build", tmp_path / "checkpoint", "--profile", "cpu-x86-64", "--recipe", few,
        "--calibration", "phantoms", "--out", tmp_path / "bundle",
    )  # fmt: skip
    assert ran.status == 2
    assert "the input of visual.blocks.1.mlp.fc2 is not finite" in ran.err
    assert not (tmp_path / "bundle").exists()


def test_numbers_that_only_the_graphs_get_wrong_are_refused(
    tiny: Any, quick: None, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sonoedge: Any
) -> None:
    """A graph that gives NaN must not pass as one without error."""
    monkeypatch.setattr(GoldenCase, "run", lambda case, _session: np.full_like(case.logits, np.nan))
    ran = sonoedge(
        "build", tiny.checkpoint, "--profile", "cpu-x86-64", "--recipe", few, "--calibration", "phantoms",
        "--out", tmp_path / "bundle",
    )  # fmt: skip
    assert ran.status == 2
    assert "golden/0: the built graphs give numbers that are not finite" in ran.err
    assert left_in(tmp_path) == []


def test_a_plan_names_every_product(tiny_model: EchoVLM) -> None:
    chosen = plan(tiny_model, RangeTable(0, {}, {}), Quantization(Scheme.W8A8, ("model.layers.1.mlp",)))
    floats = {name for name, scheme in chosen.schemes.items() if scheme is Scheme.FLOAT}
    assert floats == {f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert {name for name in chosen.schemes if name.endswith("experts")} == {
        f"model.layers.{n}.moe.experts" for n in range(3)
    }
    assert not any("gate.weight" in name or name.endswith(("moe.gate", "coefficient")) for name in chosen.schemes)
