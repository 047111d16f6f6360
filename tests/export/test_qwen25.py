"""A small random Qwen2.5-VL through the path of an EchoVLM: streamed, exported, built, opened, planned."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from sonoedge.bundle import open_bundle
from sonoedge.calibration.table import CalibrationTable
from sonoedge.device_profiles import load_profile
from sonoedge.export import build
from sonoedge.export.corpus import Batch
from sonoedge.export.layerwise import reference_logits
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.attention import padded_bias
from sonoedge.export.models.config import ModelConfig, VisionConfig, WindowConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint, save_checkpoint
from sonoedge.export.models.rope import Grid, batch_positions, patch_places
from sonoedge.export.models.vision_reach import reach_by_mask, reach_of, window_runs
from sonoedge.export.packing import PackedBatch
from sonoedge.export.passes.products import Purpose
from sonoedge.export.plan_source import bundle_model, checkpoint_model
from sonoedge.export.quantize import make_plan, product_names
from sonoedge.export.recipe import Quantization, load_recipe
from sonoedge.export.scheme import Scheme
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.generate import generate
from sonoedge.runtime.look import Prompter, look_at
from sonoedge.runtime.model import open_model
from sonoedge.runtime.preprocess import ImageSpec, Patches, preprocess
from sonoedge.runtime.sessions.ort import load_graph, run_vision

CONTEXT = 640
BOUND = 1e-4
WINDOW = 56  # pixels: 2 x 2 merged patches
VISION = VisionConfig(
    depth=3, embed_dim=32, hidden_size=64, num_heads=2, windows=WindowConfig(44, WINDOW, fullatt_block_indexes=(1,))
)
# One window, windows that divide, windows that do not on one side or both, a strip.
GRIDS: list[Grid] = [(1, 2, 2), (1, 4, 4), (1, 8, 4), (1, 6, 6), (1, 4, 10), (1, 14, 2), (1, 10, 6)]
Run = Callable[..., Any]  # the `sonoedge` fixture

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """As small as the recorded EchoVLM, whose tokenizer fits it."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(2, 3, 3),
        image_token_id=511,
        video_token_id=510,
        vision_start_token_id=508,
        vision_end_token_id=509,
        vision=VISION,
        eos_token_ids=(505,),
    )


@pytest.fixture(scope="module")
def checkpoint(config: ModelConfig, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in the released format, for pictures of at most 3 x 3 merged patches: no whole number of windows."""
    path = tmp_path_factory.mktemp("qwen25") / "checkpoint"
    model = init_model(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)), alpha=0.1)
    save_checkpoint(
        model,
        path,
        tokenizer_files_from=tiny_checkpoint,
        preprocessor={"min_pixels": 28 * 28, "max_pixels": 84 * 84},
    )
    return path


@pytest.fixture(scope="module")
def graphs(marked: Any, config: ModelConfig) -> Any:
    """Its graphs before any pass, each exported once."""
    return type(marked)(config, CONTEXT)


@pytest.fixture(scope="module")
def recipe(write_recipe: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hardly any frame is rendered, and hints stay as they come."""
    changes: dict[str, Any] = {"calibration": {"frames": 4, "smooth": True}, "hints": None}
    return write_recipe(tmp_path_factory.mktemp("recipe") / "recipe.toml", **changes)


@pytest.fixture(scope="module")
def bundle(
    checkpoint: Path, graphs: Any, recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The verb `build` on the checkpoint, and its JSON line."""
    out, printed = tmp_path_factory.mktemp("qwen25_built") / "bundle", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        graphs.stand_in(patch)
        build.run(checkpoint, "cpu-x86-64", str(recipe), "phantoms", out, as_json=True)
    return out, msgspec.json.decode(printed.getvalue().splitlines()[-1])


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> EchoVLM:
    return load_checkpoint(checkpoint)


def random_patches(grids: Sequence[Grid], seed: int = 0) -> Tensor:
    count = sum(rows * columns for _, rows, columns in grids)
    return torch.randn(count, VISION.patch_values, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def tokens_of(model: EchoVLM, grids: Sequence[Grid]) -> npt.NDArray[np.float32]:
    embeds: npt.NDArray[np.float32] = model.encode_images(random_patches(grids), grids).numpy()
    return embeds


def windows_by_hand(grid: Grid) -> list[set[tuple[int, int]]]:
    """The places of every window, row by row, from the picture's size alone."""
    _, rows, columns = grid
    side = 4  # patches
    corners = [(top, left) for top in range(0, rows, side) for left in range(0, columns, side)]
    return [
        {(r, c) for r in range(top, min(top + side, rows)) for c in range(left, min(left + side, columns))}
        for top, left in corners
    ]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_runs_are_the_windows(grid: Grid) -> None:
    order, sizes = window_runs([grid], VISION, torch.device("cpu"))
    places = patch_places(grid, 2, torch.device("cpu"))[order].tolist()
    found, start = [], 0
    for size in sizes:
        found.append({(row, column) for row, column in places[start : start + size]})
        start += size
    assert start == len(places) == len(order.unique())
    assert sorted(map(sorted, found)) == sorted(map(sorted, windows_by_hand(grid)))


def test_windows_of_several_pictures_stay_apart() -> None:
    order, sizes = window_runs(GRIDS, VISION, torch.device("cpu"))
    picture = torch.repeat_interleave(torch.arange(len(GRIDS)), torch.tensor([r * c for _, r, c in GRIDS]))[order]
    assert all(len(run.unique()) == 1 for run in picture.split(sizes))
    assert len(sizes) == sum(len(windows_by_hand(grid)) for grid in GRIDS)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_mask_attends_what_runs_attend(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(grid[1] * grid[2], 2, 16, generator=generator) for _ in range(3))
    places = patch_places(grid, 2, torch.device("cpu"))
    by_runs, by_mask = reach_of([grid], VISION, places.device), reach_by_mask(places, VISION)
    assert torch.equal(by_runs.full(q, k, v), by_mask.full(q, k, v))
    error = float((by_runs.windowed(q, k, v) - by_mask.windowed(q, k, v)).abs().max())
    assert error < 1e-5
    reaches_further = float((by_runs.full(q, k, v) - by_runs.windowed(q, k, v)).abs().max())
    assert (reaches_further > 1e-2) == (len(windows_by_hand(grid)) > 1)


def test_pictures_do_not_see_each_other(model: EchoVLM) -> None:
    together, patches = tokens_of(model, GRIDS), random_patches(GRIDS)
    start = 0
    for grid in GRIDS:
        count = grid[1] * grid[2]
        with torch.no_grad():
            alone = model.encode_images(patches[start : start + count], [grid]).numpy()
        assert np.abs(together[start // 4 : (start + count) // 4] - alone).max() < 1e-5
        start += count


def test_gradients_pass_the_windows(model: EchoVLM) -> None:
    student = init_model(model.config, seed=9)
    student.encode_images(random_patches(GRIDS), GRIDS).square().mean().backward()
    missing = [
        name
        for name, parameter in student.visual.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not missing


def hand_made(config: ModelConfig, grids: list[Grid]) -> Batch:
    ids = [4, 9]
    for _, rows, columns in grids:
        ids += [config.vision_start_token_id, *[config.image_token_id] * (rows * columns // 4)]
        ids += [config.vision_end_token_id, 17]
    tokens = torch.tensor([[*ids, 5, 6]])
    mask = torch.ones_like(tokens)
    positions, _ = batch_positions(tokens, mask, grids, config)
    packed = PackedBatch(tokens, positions, padded_bias(mask, tokens.shape[1], torch.float32), tokens)
    return Batch(random_patches(grids), grids, packed)


@torch.no_grad()
def test_a_streamed_model_is_the_whole_one(checkpoint: Path, model: EchoVLM, config: ModelConfig) -> None:
    """Block by block, as a build calibrates what does not fit in memory."""
    batches = [hand_made(config, [(1, 6, 6)]), hand_made(config, [(1, 4, 10), (1, 2, 2)])]
    for batch, found in zip(batches, reference_logits(checkpoint, batches), strict=True):
        embeds = model.encode_images(batch.patches, batch.grids)
        expected = model(batch.packed.input_ids, batch.packed.positions, image_embeds=embeds).logits[0]
        error = float((found - expected).abs().max() / expected.abs().max())
        print(f"largest error {error:.1e}")
        assert error < BOUND


@pytest.fixture(scope="module")
def compiled(
    checkpoint: Path,
    config: ModelConfig,
    graphs: Any,
    compile_graphs: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """The float graph of the vision tower for every purpose."""
    plan = make_plan(config, CalibrationTable.empty(), Quantization(Scheme.FLOAT))
    return compile_graphs(
        checkpoint, {"vision": graphs.vision()}, plan, tmp_path_factory.mktemp("qwen25") / "graphs", CONTEXT
    )


@pytest.mark.parametrize("purpose", [Purpose.ROWS, Purpose.PORTABLE, Purpose.TENSORRT])
def test_the_graph_gives_the_models_image_tokens(compiled: Any, model: EchoVLM, purpose: Purpose) -> None:
    """One graph for every grid: windows come from the places of patches."""
    session, errors = load_graph(compiled.path("vision", purpose), 1), {}
    for grid in GRIDS:
        patches = Patches(random_patches([grid]).numpy(), grid)
        found = run_vision(session, patches, ImageSpec())
        errors[grid] = float(np.abs(found - tokens_of(model, [grid])).max())
    print(purpose.value, "largest error:", max(errors.values()))
    assert max(errors.values()) < BOUND


def test_a_graph_without_windows_would_be_noticed(model: EchoVLM) -> None:
    """What full attention everywhere makes of the same weights differs by far more than the bound."""
    vision = msgspec.structs.replace(VISION, windows=WindowConfig(44, WINDOW, (0, 1, 2)))
    blind = EchoVLM(msgspec.structs.replace(model.config, vision=vision)).eval()
    blind.load_state_dict(model.state_dict())
    for grid in GRIDS:
        difference = np.abs(tokens_of(blind, [grid]) - tokens_of(model, [grid])).max()
        assert difference > 100 * BOUND if len(windows_by_hand(grid)) > 1 else difference < BOUND


def test_marks_are_called_as_the_recipe_calls_products(graphs: Any, config: ModelConfig) -> None:
    nodes = [node for node in graphs.vision().graph if node.domain == DOMAIN]
    named = {
        kind: {n.attributes["name"].as_string() for n in nodes if n.op_type == kind} for kind in ("Linear", "RMSNorm")
    }
    assert named["Linear"] == {name for name in product_names(config) if name.startswith("visual.")}
    assert {f"visual.blocks.2.mlp.{part}_proj" for part in ("gate", "up", "down")} < named["Linear"]
    norms = {f"visual.blocks.{block}.norm{number}" for block in range(3) for number in (1, 2)}
    assert named["RMSNorm"] == norms | {"visual.merger.ln_q"}


def test_the_build_makes_a_whole_bundle(bundle: tuple[Path, dict[str, Any]], checkpoint: Path, sonoedge: Run) -> None:
    path, report = bundle
    manifest = open_bundle(path).manifest
    assert manifest.model.architecture == "Qwen2_5_VLForConditionalGeneration"
    assert manifest.model.parameters == sum(p.numel() for p in load_checkpoint(checkpoint).parameters())
    assert manifest.experts is None
    assert report["quantized_share"] == 1.0
    assert report["golden_error"] < manifest.golden.bound
    # The graph knows its windows: a runtime that is older than this architecture serves it as well.
    assert manifest.format_version == 1
    for formulation in ("ort", "qdq", "trt"):
        graph = ir.load(
            path / next(g.path for g in manifest.graphs if (g.purpose, g.formulation) == ("vision", formulation))
        )
        assert [value.name for value in graph.graph.inputs] == ["patches", "places"]
    assert sonoedge("verify", path).status == 0


def test_the_runtime_serves_the_bundle(bundle: tuple[Path, dict[str, Any]], model: EchoVLM) -> None:
    """Golden outputs are repeated when it opens; then hints, an answer, and int8 image tokens near the float ones."""
    opened = open_model(bundle[0])
    frame = Frame(np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8), 0, 0, None, "test")
    assert [hint.hint for hint in opened.engine.hints(frame)][:3] == ["region", "quality", "finding"]
    look = look_at(opened.session, frame)
    prompt = Prompter(opened.session, opened.tokenizer).question([look], "Is a lesion visible?", "en")
    texts = ["".join(generate(opened.session, opened.tokenizer, prompt, max_tokens=8)) for _ in range(2)]
    assert texts[0] == texts[1]
    patches = preprocess(frame.image, opened.session.image)
    assert patches.grid not in ((1, 4, 4), (1, 2, 2)), "one window only"
    expected = TorchSession(model, opened.session.image, CONTEXT).encode_image(patches)
    found = opened.session.encode_image(patches)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    print(f"image tokens in int8: {error:.1%} from the float model's")
    assert 1e-4 < error < 0.15
    opened.session.close()


def test_a_plan_of_the_bundle_is_that_of_the_checkpoint(
    bundle: tuple[Path, dict[str, Any]], checkpoint: Path, recipe: Path, model: EchoVLM
) -> None:
    profile = load_profile("jetson-agx-orin-64gb")
    planned, built = checkpoint_model(checkpoint, load_recipe(recipe), profile), bundle_model(bundle[0], profile)
    assert (built.shape, built.weights, built.use) == (planned.shape, planned.weights, planned.use)
    assert planned.shape.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_other_verbs_read_it(checkpoint: Path, sonoedge: Run) -> None:
    inspected = msgspec.json.decode(sonoedge("inspect", checkpoint, "--json").last_line)
    assert inspected["architecture"] == "Qwen2_5_VLForConditionalGeneration"
    assert (inspected["experts"], inspected["parameters"]) == (0, inspected["active_parameters"])
    scored = sonoedge("evaluate", checkpoint, "--data", "phantoms", "--frames", "8", "--json")
    assert (scored.status, msgspec.json.decode(scored.last_line)["frames"]) == (0, 8)
