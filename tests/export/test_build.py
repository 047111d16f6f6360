"""`sonoedge build` on the smallest checkpoint: what the bundle holds, and what is refused leaves nothing behind."""

import errno
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from sonoedge.bundle import HINT_SCHEMA_FILE, TOKENIZER_FILE, open_bundle
from sonoedge.calibration.table import CalibrationTable
from sonoedge.export import build, quantizing, weight_file
from sonoedge.export.bundle_graphs import WEIGHTS
from sonoedge.export.layout import plan_layout
from sonoedge.export.models.loading import load_checkpoint, open_checkpoint
from sonoedge.export.quantize import make_plan
from sonoedge.export.recipe import load_recipe
from sonoedge.export.weight_file import journal_of
from sonoedge.runtime import hints
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.golden import GoldenCase
from sonoedge.runtime.model import open_model


@pytest.fixture
def quick(marked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds of the same checkpoint take graphs that were exported before."""
    marked.stand_in(monkeypatch)


FEW: dict[str, dict[str, Any]] = {"calibration": {"frames": 4, "least_expert_tokens": 1}, "hints": {"frames": 8}}
# Nothing to calibrate, no hints: a build is hardly more than its weights and graphs.
WEIGHT_ONLY: dict[str, Any] = {
    "calibration": {"frames": 2, "least_expert_tokens": 0},
    "quantization": {"default": "w8a16"},
    "limits": {"golden_cases": 1},
    "hints": None,
}


@pytest.fixture
def few(write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for builds that end early: hardly any frame is rendered."""
    return write_recipe(tmp_path_factory.mktemp("few") / "recipe.toml", **FEW)


@pytest.fixture
def weight_only(write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that calibrates nothing."""
    return write_recipe(tmp_path_factory.mktemp("weight_only") / "recipe.toml", **WEIGHT_ONLY)


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
    table = msgspec.json.decode(bundle.path("calibration.json").read_bytes(), type=CalibrationTable)
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


def test_all_graphs_share_their_weights_and_are_valid(tiny: Any) -> None:
    bundle = open_bundle(tiny.bundle)
    graphs = bundle.manifest.graphs
    assert [(graph.purpose, graph.formulation) for graph in graphs] == [
        ("vision", "ort"), ("vision", "qdq"), ("decoder", "ort"), ("decoder", "qdq"), ("vision", "trt"),
        ("decoder", "trt"), ("decode", "ort"),
    ]  # fmt: skip
    for graph in graphs:
        path = bundle.path(graph.path)
        model = onnx.load(path, load_external_data=False)
        held = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert held == {Path(WEIGHTS).name}
        inline = sum(len(t.raw_data) for t in model.graph.initializer if not t.external_data)
        assert inline < 20_000, "a second copy of the weights"
        custom = {node.domain for node in model.graph.node} - {"", "sonoedge"}
        assert custom <= ({"com.microsoft"} if graph.formulation == "ort" else set())
        if graph.formulation in ("qdq", "trt"):
            onnx.checker.check_model(str(path))
    held_files = [name for name in bundle.manifest.files if name.startswith("graphs/") and not name.endswith(".onnx")]
    assert held_files == [WEIGHTS]
    vision, decoder, decode = (bundle.manifest.stages[stage].bytes for stage in ("vision", "decoder", "decode"))
    assert vision is not None
    assert decoder is not None
    assert decode is not None
    assert 0 < decode < decoder
    assert not any(path.name.endswith(("journal", "lock")) for path in tiny.bundle.rglob("*"))


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
        quantization={"graphs": "memory", "schemes": {"visual": "float", "lm_head": "float"}},
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
    assert bundle.find_graph("decode", "ort") is None  # one form in memory
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


TOO_LARGE: dict[str, dict[str, dict[str, Any]]] = {
    "search": {"search": {"frames": 1}, "fidelity": {"first_frame_seed": 1, "frames": 1, "least_top1": 0.5}},
    "qat": {
        "qat": {
            "seed": 1, "steps": 1, "batch": 1, "learning_rate": 1e-3,
            "warmup_steps": 0, "temperature": 1.0,
        }
    },
    "fidelity": {"fidelity": {"first_frame_seed": 1, "frames": 1, "least_top1": 0.5}},
}  # fmt: skip


@pytest.mark.parametrize("section", TOO_LARGE)
def test_what_needs_the_whole_model_is_refused_where_it_does_not_fit(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    sonoedge: Any, section: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(build._Job, "fits", property(lambda _job: False))
    recipe = write_recipe(tmp_path / "r.toml", **(WEIGHT_ONLY | TOO_LARGE[section]))
    ran = build_weight_only(sonoedge, tiny_checkpoint, recipe, tmp_path / "new" / "bundle")
    assert ran.status == 2
    # A search has floors, which need the whole model as well and are refused first.
    assert f"[{'fidelity' if section == 'search' else section}] " in ran.err
    assert "on a larger machine" in ran.err
    assert left_in(tmp_path) == ["r.toml"]


def test_a_model_that_does_not_fit_is_built_without_running_it(
    tiny_checkpoint: Path, quick: None, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sonoedge: Any
) -> None:
    """Calibrated block by block; no session is opened, so there is no measured error and no calibrated hint."""
    monkeypatch.setattr(build._Job, "fits", property(lambda _job: False))
    monkeypatch.setattr(build, "OrtSession", lambda *_, **__: pytest.fail("the graphs were loaded"))
    ran = build_weight_only(sonoedge, tiny_checkpoint, few, tmp_path / "bundle")
    assert ran.status == 0, ran.err
    report = msgspec.json.decode(ran.last_line)
    assert report["golden_error"] is None
    assert report["golden_bound"] == 0.6
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest.hint_calibration == {}
    assert len([name for name in manifest.files if name.startswith("golden/")]) == 2


def test_too_few_calibration_frames_are_told(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], tmp_path: Path, sonoedge: Any
) -> None:
    turns = [{"from": "human", "value": "<image>Which region is shown?"}, {"from": "gpt", "value": "liver"}]
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((60, 90, 3), np.uint8))
    cases = [{"id": number, "image": ["0.png"], "conversations": turns} for number in range(3)]
    (tmp_path / "cases.json").write_bytes(msgspec.json.encode(cases))
    recipe = write_recipe(tmp_path / "r.toml", calibration={"frames": 9})
    ran = sonoedge(
        "build", tiny_checkpoint, "--profile", "cpu-x86-64", "--recipe", recipe,
        "--calibration", tmp_path / "cases.json", "--out", tmp_path / "new" / "bundle",
    )  # fmt: skip
    assert ran.status == 2
    assert "calibration.frames = 9 and the data holds 3: give more data, or ask for fewer frames" in ran.err
    assert left_in(tmp_path) == ["0.png", "cases.json", "r.toml"]


LATE_REFUSALS: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "an expert with too few tokens": (
        {"calibration": {"frames": 1, "least_expert_tokens": 100_000}},
        "calibration gave model.layers.0.moe.experts.",
    ),
    "too few frames for familiarity": ({"hints": {"frames": 12}}, "hints.frames = 12: "),
    "a context that the questions do not fit": ({"limits": {"context": 40}}, "limits.context = 40"),
    "a scheme without product": (
        {"quantization": {"schemes": {"visul": "float"}}},
        "quantization.schemes names 'visul'",
    ),
    "a search without floor": ({"search": {"frames": 1}}, "[search] has no floor to search for"),
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


@pytest.fixture
def spoilt(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint with one weight that is no number."""
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    tensors["visual.blocks.1.mlp.fc1.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("calibrated", "words"),
    [
        (True, "the input of visual.blocks.1.mlp.fc2 is not finite"),
        (False, "visual.blocks.1.mlp.fc1.weight: a weight is not finite"),
    ],
)
def test_weights_that_are_not_numbers_are_refused(
    spoilt: Path, quick: None, few: Path, weight_only: Path, tmp_path: Path, sonoedge: Any, calibrated: bool, words: str
) -> None:
    ran = sonoedge(
        "build", spoilt, "--profile", "cpu-x86-64", "--recipe", few if calibrated else weight_only,
        "--calibration", "phantoms", "--out", tmp_path / "new" / "bundle",
    )  # fmt: skip
    assert ran.status == 2
    assert words in ran.err
    assert left_in(tmp_path) == ["checkpoint"]


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


def build_weight_only(sonoedge: Any, checkpoint: Path, recipe: Path, out: Path) -> Any:
    return sonoedge(
        "build", checkpoint, "--profile", "cpu-x86-64", "--recipe", recipe, "--calibration", "phantoms",
        "--out", out, "--json",
    )  # fmt: skip


def test_the_same_build_gives_the_same_weights_and_graphs(
    tiny_checkpoint: Path, quick: None, weight_only: Path, tmp_path: Path, sonoedge: Any
) -> None:
    for name in ("one", "two"):
        ran = build_weight_only(sonoedge, tiny_checkpoint, weight_only, tmp_path / name)
        assert ran.status == 0, ran.err
        assert msgspec.json.decode(ran.last_line)["tensors_kept"] == 0
    one, two = (open_bundle(tmp_path / name).manifest for name in ("one", "two"))
    assert one.files == two.files
    assert one.model.id == two.model.id
    assert left_in(tmp_path) == ["one", "two"]


SLOW = """
import sys, time
from sonoedge import cli
from sonoedge.export import weight_file

quantize = weight_file.quantize_weight
weight_file.quantize_weight = lambda rows, block: time.sleep(0.05) or quantize(rows, block)
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_killed_build_goes_on_where_it_was(
    tiny_checkpoint: Path, quick: None, weight_only: Path, tmp_path: Path, sonoedge: Any
) -> None:
    """A real process, killed without warning in the middle of the weights; meanwhile a second build is refused."""
    out = tmp_path / "new" / "bundle"
    arguments = [
        "build", tiny_checkpoint, "--profile", "cpu-x86-64", "--recipe", weight_only, "--calibration", "phantoms",
        "--out", out,
    ]  # fmt: skip
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen([sys.executable, "-c", SLOW, *map(str, arguments)], stdout=said, stderr=said)
    journal = journal_of(out.parent / ".bundle.building" / "model.weights")
    try:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 12:
            assert process.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.02)
        ran = build_weight_only(sonoedge, tiny_checkpoint, weight_only, out)
        assert ran.status == 2
        assert "bundle is being built by another process: wait for it" in ran.err
    finally:
        process.kill()
        process.wait()
    assert left_in(out.parent) == [".bundle.building"]
    finished = journal.read_bytes().count(b"\n") - 1
    ran = build_weight_only(sonoedge, tiny_checkpoint, weight_only, out)
    assert ran.status == 0, ran.err
    assert msgspec.json.decode(ran.last_line)["tensors_kept"] == finished >= 11
    assert left_in(out.parent) == ["bundle"]
    fresh = build_weight_only(sonoedge, tiny_checkpoint, weight_only, tmp_path / "fresh")
    assert fresh.status == 0, fresh.err
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "fresh" / WEIGHTS).read_bytes()


def test_a_disk_that_fills_up_is_told_and_the_next_run_finishes(
    tiny_checkpoint: Path, quick: None, weight_only: Path, tmp_path: Path, sonoedge: Any
) -> None:
    out = tmp_path / "new" / "bundle"
    written: list[str] = []
    real = weight_file._write_unit

    def filling(file: Any, unit: Any, *rest: Any) -> str:
        if len(written) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(unit.values.name)
        return real(file, unit, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_file, "_write_unit", filling)
        ran = build_weight_only(sonoedge, tiny_checkpoint, weight_only, out)
    assert ran.status == 2
    assert "bundle: the disk is full: free space; what is finished is kept, run the same command again" in ran.err
    assert left_in(out.parent) == [".bundle.building"]
    ran = build_weight_only(sonoedge, tiny_checkpoint, weight_only, out)
    assert ran.status == 0, ran.err
    assert msgspec.json.decode(ran.last_line)["tensors_kept"] == 10
    assert left_in(out.parent) == ["bundle"]


def test_a_disk_that_fills_up_later_keeps_the_calibration_too(
    tiny_checkpoint: Path, quick: None, write_recipe: Callable[..., Path], tmp_path: Path, sonoedge: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Full while the graphs are written: nothing that was slow is done again."""
    changes = {"calibration": {"frames": 4, "least_expert_tokens": 1, "smooth": True}, "hints": None}
    recipe = write_recipe(tmp_path / "recipe.toml", **changes)
    out = tmp_path / "bundle"

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "write_graphs", full)
        ran = build_weight_only(sonoedge, tiny_checkpoint, recipe, out)
    assert "the disk is full: free space; what is finished is kept" in ran.err
    monkeypatch.setattr(quantizing, "calibrate", lambda *_: pytest.fail("calibrated again"))
    ran = build_weight_only(sonoedge, tiny_checkpoint, recipe, out)
    assert ran.status == 0, ran.err
    config, _ = open_checkpoint(tiny_checkpoint)
    manifest = open_bundle(out).manifest
    table = msgspec.json.decode((out / "calibration.json").read_bytes(), type=CalibrationTable)
    assert table.smoothing_sha256 is not None
    assert manifest.hashes.calibration == table.sha256
    layout = plan_layout(config, make_plan(config, table, load_recipe(recipe).quantization))
    assert msgspec.json.decode(ran.last_line)["tensors_kept"] == len(layout.units)
    assert left_in(tmp_path) == ["bundle", "recipe.toml"]


def test_a_missing_shard_is_named(tiny_checkpoint: Path, few: Path, tmp_path: Path, sonoedge: Any) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_bytes(msgspec.json.encode(index))
    ran = build_weight_only(sonoedge, checkpoint, few, tmp_path / "new" / "bundle")
    assert ran.status == 2
    assert "model-00001-of-00002.safetensors is missing" in ran.err
    assert "render" not in ran.err
    assert left_in(tmp_path) == ["checkpoint"]


def test_a_scheme_that_the_profile_cannot_run_is_refused_at_once(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], tmp_path: Path, sonoedge: Any
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", quantization={"schemes": {"model.layers": "w8a8-dynamic"}})
    ran = sonoedge(
        "build", tiny_checkpoint, "--profile", "jetson-orin-nano-8gb", "--recipe", recipe, "--calibration", "phantoms",
        "--out", tmp_path / "new" / "bundle",
    )  # fmt: skip
    assert ran.status == 2
    assert "quantization.schemes.'model.layers' = 'w8a8-dynamic': jetson-orin-nano-8gb runs tensorrt" in ran.err
    assert "choose w8a8, w8a16, w8a16-block128, float" in ran.err
    assert "render" not in ran.err
    assert left_in(tmp_path) == ["r.toml"]
