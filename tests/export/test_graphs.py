"""The exported graphs in ONNX Runtime: float ones repeat the recorded outputs, int8 ones hold the weights promised."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from sonoedge.calibration.ranges import RangeTable
from sonoedge.errors import SonoEdgeError
from sonoedge.export.graphs import Attention, export_decoder
from sonoedge.export.lowering import QuantizationPlan, Scheme, lower
from sonoedge.export.markers import DOMAIN
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint
from sonoedge.export.quantize import plan, products, quantized_share
from sonoedge.export.recipe import Quantization
from sonoedge.export.torch_session import TorchSession, decoder_spec
from sonoedge.runtime.preprocess import ImageSpec, Patches
from sonoedge.runtime.sessions.ort import OrtSession, _load, patch_places

BOUND = 1e-4
CONTEXT = 640  # of the recipe that the graphs were exported for
Floats = npt.NDArray[np.float32]


class Case(msgspec.Struct, frozen=True):
    """One recorded sequence without padding."""

    ids: npt.NDArray[np.int64]  # [s]
    positions: npt.NDArray[np.int64]  # [3, s]
    images: list[Patches]
    logits: Floats  # [s, vocab]


def recorded(folder: Path) -> dict[str, Case]:
    """Every recorded sequence, those of a padded batch one by one."""
    cases = {}
    for name in ("text", "image", "two_images", "batch_left_padded"):
        tensors = load_file(folder / f"{name}.safetensors")
        grids = [tuple(int(n) for n in row) for row in tensors.get("image_grid_thw", np.empty((0, 3)))]
        ends = np.cumsum([t * h * w for t, h, w in grids], dtype=int)
        pictures = iter(
            Patches(tensors["pixel_values"][end - t * h * w : end], (t, h, w))
            for (t, h, w), end in zip(grids, ends, strict=True)
        )
        for row, mask in enumerate(tensors["attention_mask"].astype(bool)):
            ids = tensors["input_ids"][row][mask]
            images = [next(pictures) for _ in range(int((ids == 508).sum()))]
            logits = tensors["logits"][row][mask]
            cases[f"{name}.{row}"] = Case(ids, tensors["position_ids"][:, row][:, mask], images, logits)
        assert next(pictures, None) is None
    return cases


@pytest.fixture(scope="module")
def cases(golden_folder: Path) -> dict[str, Case]:
    return recorded(golden_folder / "echovlm_tiny")


@pytest.fixture(scope="module")
def float_plan(tiny_checkpoint: Path) -> QuantizationPlan:
    linears, mixtures = products(load_checkpoint(tiny_checkpoint))
    return QuantizationPlan(dict.fromkeys([*linears, *mixtures, "lm_head"], Scheme.FLOAT), {})


@pytest.fixture(scope="module")
def float_graphs(tiny: Any, float_plan: QuantizationPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all three graphs, nothing quantized."""
    folder = tmp_path_factory.mktemp("float")
    for name, model in tiny.marked.items():
        lowered = model.clone()
        lower(lowered, float_plan)
        ir.save(lowered, folder / f"{name}.onnx")
    return folder


@pytest.fixture
def open_graphs(tiny_model: EchoVLM) -> Iterator[Callable[[Path], OrtSession]]:
    """Open the vision and in-place graphs of a folder as the runtime does."""
    opened = []

    def make(folder: Path) -> OrtSession:
        spec = decoder_spec(tiny_model.config, CONTEXT)
        session = OrtSession(folder / "vision.onnx", folder / "in_place.onnx", ImageSpec(), spec, threads=1)
        opened.append(session)
        return session

    yield make
    for session in opened:
        session.close()


def embeds_of(session: OrtSession, case: Case) -> Floats | None:
    return np.concatenate([session.encode_image(image) for image in case.images]) if case.images else None


def test_recorded_sequences_are_what_they_should_be(cases: dict[str, Case]) -> None:
    assert len(cases) > 4
    assert {len(case.images) for case in cases.values()} >= {0, 1, 2}


def test_in_place_graph_repeats_the_recording_in_one_pass(
    float_graphs: Path, open_graphs: Callable[[Path], OrtSession], cases: dict[str, Case]
) -> None:
    session = open_graphs(float_graphs)
    for name, case in cases.items():
        session.rewind(0)
        rows = np.arange(len(case.ids))
        found = session.extend(case.ids, case.positions, image_embeds=embeds_of(session, case), logits_rows=rows)
        error = np.abs(found - case.logits).max()
        print(name, "largest error:", error)
        assert error < BOUND


def test_in_place_graph_repeats_the_recording_token_by_token(
    float_graphs: Path, open_graphs: Callable[[Path], OrtSession], cases: dict[str, Case]
) -> None:
    session = open_graphs(float_graphs)
    for case in cases.values():
        session.rewind(0)
        embeds = embeds_of(session, case)
        first = 1 + max(np.flatnonzero(case.ids == 511), default=0)  # images go in whole
        found = [session.extend(case.ids[:first], case.positions[:, :first], image_embeds=embeds)]
        found += [
            session.extend(case.ids[n : n + 1], case.positions[:, n : n + 1]) for n in range(first, len(case.ids))
        ]
        assert session.length == len(case.ids)
        assert np.abs(np.concatenate(found) - case.logits[first - 1 :]).max() < BOUND


def test_branches_of_a_tree_and_rewinding_repeat_the_recording(
    float_graphs: Path, open_graphs: Callable[[Path], OrtSession], cases: dict[str, Case]
) -> None:
    """The recorded ending stands behind its prefix beside a strange branch, as hints do, and again after a rewind."""
    session = open_graphs(float_graphs)
    case = cases["two_images.0"]
    total = len(case.ids)
    length = 1 + int(np.flatnonzero(case.ids == 511)[-1])
    ending = total - length
    assert ending > 2
    session.extend(case.ids[:length], case.positions[:, :length], image_embeds=embeds_of(session, case))
    strange = np.full(5, 77, np.int64)
    ids = np.concatenate([strange, case.ids[length:]])
    positions = np.concatenate(
        [case.positions[:, length : length + 1].repeat(5, axis=1), case.positions[:, length:]], axis=1
    )
    visible = np.zeros((5 + ending, length + 5 + ending), bool)
    visible[:, :length] = True
    visible[:5, length : length + 5] = np.tri(5, dtype=bool)
    visible[5:, length + 5 :] = np.tri(ending, dtype=bool)
    for _ in range(2):
        rows = np.arange(5, 5 + ending)
        found = session.extend(ids, positions, visible=visible, logits_rows=rows)
        assert np.abs(found - case.logits[length:]).max() < BOUND
        session.rewind(length)
    found = session.extend(case.ids[length:], case.positions[:, length:], logits_rows=np.arange(ending))
    assert np.abs(found - case.logits[length:]).max() < BOUND


def test_standard_graph_repeats_the_recording_in_two_parts(float_graphs: Path, cases: dict[str, Case]) -> None:
    """Standard operators return the cache grown; the second part is given what the first returned."""
    vision, decoder = (_load(float_graphs / f"{name}.onnx", 1) for name in ("vision", "standard"))
    names = [output.name for output in decoder.get_outputs()]
    for name, case in cases.items():
        embeds = [
            vision.run(None, {"patches": image.values, "places": patch_places(image.grid, 2)})[0]
            for image in case.images
        ]
        held = np.concatenate(embeds) if embeds else np.zeros((1, 64), np.float32)
        cache = {f"past_{n[8:]}": np.zeros((1, 2, 0, 16), np.float32) for n in names[1:]}
        middle = 1 + max(np.flatnonzero(case.ids == 511), default=0)
        found = []
        for start, end in ((0, middle), (middle, len(case.ids))):
            visible = np.tri(end - start, end, start, dtype=bool)
            feed = {
                "input_ids": case.ids[None, start:end],
                "positions": case.positions[:, None, start:end],
                "image_embeds": held,
                "attention_bias": np.where(visible, np.float32(0), np.float32(-1e9))[None, None],
                "logits_rows": np.arange(end - start),
                "last_token": np.array([end - 1], np.int32),
                "total_tokens": np.array(end, np.int32),
                **cache,
            }
            outputs = decoder.run(None, feed)
            found.append(outputs[0])
            cache = {f"past_{n[8:]}": value for n, value in zip(names[1:], outputs[1:], strict=True)}
        error = np.abs(np.concatenate(found) - case.logits).max()
        print(name, "largest error:", error)
        assert error < BOUND


def test_marks_are_called_as_the_recipe_calls_products(tiny: Any, tiny_model: EchoVLM) -> None:
    linears, mixtures = products(tiny_model)
    for decoder in ("in_place", "standard"):
        names = [
            node.attributes["name"].as_string()
            for graph in ("vision", decoder)
            for node in tiny.marked[graph].graph
            if node.domain == DOMAIN
        ]
        assert len(names) == len(set(names))
        assert set(names) == {*linears, *mixtures, "lm_head"}


@pytest.fixture
def ranges(tiny: Any) -> RangeTable:
    """What the build measured."""
    return msgspec.json.decode((tiny.bundle / "calibration.json").read_bytes(), type=RangeTable)


def test_int8_weights_are_symmetric_and_per_channel(tiny: Any, tiny_model: EchoVLM, ranges: RangeTable) -> None:
    chosen = plan(tiny_model, ranges, Quantization(Scheme.W8A8))
    assert quantized_share(chosen) == 1.0
    linears, mixtures = products(tiny_model)
    counted = 0
    for name in ("vision", "in_place", "standard"):
        model = tiny.marked[name].clone()
        lower(model, chosen)
        held = {key: value.const_value.numpy() for key, value in model.graph.initializers.items()}
        assert not any(node.op_type == "Linear" and node.domain == DOMAIN for node in model.graph)
        for key, array in held.items():
            if key.endswith("weight_int8"):
                counted += 1
                assert array.dtype == np.int8
                assert array.min() >= -127
                label = key.removesuffix("_int8")
                assert held[f"{label}_scale"].shape == (array.shape[1],)
                assert held[f"{label}_zero"].dtype == np.int8
                assert held[f"{label}_zero"].shape == (array.shape[1],)
                assert not held[f"{label}_zero"].any()
        left = [key for key, array in held.items() if array.dtype == np.float32 and array.ndim == 2]
        assert not any(key.startswith(tuple(linears)) or ".experts." in key for key in left), left
    experts = tiny_model.config.moe.num_experts  # type: ignore[union-attr]
    vision = sum(name.startswith("visual.") for name in linears)
    assert counted == vision + 2 * (len(linears) - vision + 2 * experts * len(mixtures) + 1)


def test_schemes_may_differ_between_experts(
    tiny: Any, tiny_model: EchoVLM, ranges: RangeTable, float_plan: QuantizationPlan, float_graphs: Path,
    open_graphs: Callable[[Path], OrtSession], cases: dict[str, Case], tmp_path: Path,
) -> None:  # fmt: skip
    """Two sorts of experts in one graph each keep their own meaning."""
    errors = {}
    settings = {
        "mixed": Quantization(Scheme.W8A8, ("model.layers.0.moe", "model.layers.2.moe", "visual")),
        "int8": Quantization(Scheme.W8A8),
    }
    case = cases["image.0"]
    for label, setting in settings.items():
        folder = tmp_path / label
        folder.mkdir()
        chosen = plan(tiny_model, ranges, setting)
        assert (quantized_share(chosen) < 1) == (label == "mixed")
        for name in ("vision", "in_place"):
            model = tiny.marked[name].clone()
            lower(model, chosen)
            ir.save(model, folder / f"{name}.onnx")
        session = open_graphs(folder)
        embeds = embeds_of(session, case)
        found = session.extend(case.ids, case.positions, image_embeds=embeds, logits_rows=np.arange(len(case.ids)))
        errors[label] = float(np.linalg.norm(found - case.logits) / np.linalg.norm(case.logits))
    print("relative errors:", errors)
    assert 1e-4 < errors["mixed"] < errors["int8"] < 0.25


def test_a_float_name_that_is_no_product_is_refused(tiny_model: EchoVLM, ranges: RangeTable) -> None:
    with pytest.raises(SonoEdgeError, match=r"quantization.float names 'vision', with which no product begins"):
        plan(tiny_model, ranges, Quantization(Scheme.W8A8, ("visual", "vision")))


@pytest.mark.parametrize("variant", ["tied and normalised", "dense"])
def test_other_architectures_are_exported_too(small_config: ModelConfig, tmp_path: Path, variant: str) -> None:
    """Tied embeddings serve as the head, normalised routing and dense layers keep their meaning."""
    assert small_config.moe is not None
    moe = msgspec.structs.replace(small_config.moe, norm_topk_prob=True)
    tied = variant != "dense"
    config = msgspec.structs.replace(
        small_config, num_hidden_layers=1, moe=moe if tied else None, tie_word_embeddings=tied
    )
    model = init_model(config, seed=5, std=0.15).eval()
    linears, mixtures = products(model)
    names = [*linears, *mixtures, "lm_head"]
    assert bool(mixtures) == tied
    graph = export_decoder(model, Attention.IN_PLACE, 32)
    lower(graph, QuantizationPlan(dict.fromkeys(names, Scheme.FLOAT), {}))
    ir.save(graph, tmp_path / "in_place.onnx")
    vision = tmp_path / "in_place.onnx"  # never run here
    session = OrtSession(vision, tmp_path / "in_place.onnx", ImageSpec(), decoder_spec(config, 32), threads=1)
    ids = np.array([5, 6, 89, 89, 7, 8, 9], np.int64)
    positions = np.tile(np.arange(7), (3, 1))
    embeds = np.random.default_rng(0).normal(0, 1, (2, 48)).astype(np.float32)
    rows = np.arange(7)
    wanted = TorchSession(model, ImageSpec(), 32).extend(ids, positions, image_embeds=embeds, logits_rows=rows)
    first = session.extend(ids[:5], positions[:, :5], image_embeds=embeds, logits_rows=rows[:5])
    rest = session.extend(ids[5:], positions[:, 5:], logits_rows=rows[:2])
    error = np.abs(np.concatenate([first, rest]) - wanted).max()
    print("largest error:", error)
    assert error < BOUND
    session.close()
