"""A model run one block at a time gives what the whole model gives: logits, ranges, routes, smoothed or not."""

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export import block_smoothing
from sonoedge.export import weights as weights_module
from sonoedge.export.checkpoint_files import image_spec
from sonoedge.export.corpus import Batch, Batches, PhantomCorpus
from sonoedge.export.layerwise import Calibrated, calibrate, reference_logits
from sonoedge.export.models.attention import padded_bias
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint, save_checkpoint
from sonoedge.export.models.rope import batch_positions
from sonoedge.export.packing import PackedBatch
from sonoedge.export.recipe import Calibration
from sonoedge.export.smoothing_groups import smoothing_groups
from sonoedge.export.streamed_model import Block, Passage, passage, stream
from sonoedge.export.vectors import read_cases
from sonoedge.export.weights import Weights
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

FRAMES = 5
CONTEXT = 640
BOUND = 1e-4  # of the largest logit
ROUNDING = 1e-4  # of a range: the whole model sums in another order
FLOAT = ("moe.gate", "shared_expert_gate", "coefficient")


def settings(**changes: object) -> Calibration:
    chosen = Calibration(
        first_frame_seed=0, frames=FRAMES, least_expert_tokens=0, observer="min-max", percentile=99.99, smooth=False
    )
    return msgspec.structs.replace(chosen, **changes)


@pytest.fixture
def corpus(tiny_checkpoint: Path, frames: PhantomPool) -> PhantomCorpus:
    return PhantomCorpus(frames, image_spec(tiny_checkpoint))


@pytest.fixture
def run(tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, corpus: PhantomCorpus) -> Callable[..., Calibrated]:
    """Calibrate the smallest checkpoint with some settings changed."""

    def calibrated(checkpoint: Path = tiny_checkpoint, **changes: object) -> Calibrated:
        return calibrate(checkpoint, corpus, tiny_tokenizer, image_spec(checkpoint), settings(**changes), CONTEXT)

    return calibrated


@pytest.fixture
def batches(tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, corpus: PhantomCorpus) -> list[Batch]:
    """The very batches that calibration runs."""
    spec = image_spec(tiny_checkpoint)
    made = Batches(corpus, tiny_tokenizer, spec, size=1, seed=0, context=CONTEXT)
    spread = [index * len(corpus) // FRAMES for index in range(FRAMES)]  # as calibration takes them
    samples = [corpus.sample(place, np.random.default_rng(index)) for index, place in enumerate(spread)]
    return [made.collate(tuple(image.grid for image in sample.images), [sample]) for sample in samples]


@torch.no_grad()
def whole_logits(model: EchoVLM, batch: Batch) -> Tensor:
    """Logits [s, vocab] of the model in memory."""
    embeds = model.encode_images(batch.patches, batch.grids) if batch.grids else None
    packed = batch.packed
    output = model(packed.input_ids, packed.positions, image_embeds=embeds, attention_bias=packed.attention_bias)
    logits: Tensor = output.logits[0]
    return logits


def hand_made(config: ModelConfig, seed: int, *, pictured: bool = True) -> Batch:
    """A batch of a sequence with an image, or without."""
    generator = torch.Generator().manual_seed(seed)
    image = [config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id]
    ids = torch.tensor([[4, 9, *(image if pictured else []), 17, 17, 5 + seed]])
    grids = [(1, 4, 4)] if pictured else []
    mask = torch.ones_like(ids)
    positions, _ = batch_positions(ids, mask, grids, config)
    patches = torch.randn(16 if pictured else 0, config.vision.patch_values, generator=generator)
    return Batch(patches, grids, PackedBatch(ids, positions, padded_bias(mask, ids.shape[1], torch.float32), ids))


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    pairs = zip(found, expected, strict=True)
    error = max(float((ours - theirs).abs().max() / theirs.abs().max()) for ours, theirs in pairs)
    print(f"largest error {error:.1e}")
    return error


def test_logits_are_the_whole_models(
    tiny_checkpoint: Path, tiny_model: EchoVLM, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "CHUNK_VALUES", 750)  # a few rows at a time
    expected = [whole_logits(tiny_model, batch) for batch in batches]
    found = reference_logits(tiny_checkpoint, batches)
    assert largest_error(found, expected) < BOUND
    rows = [torch.tensor([0, len(logits) - 1]) for logits in expected]
    some = reference_logits(tiny_checkpoint, batches, rows)
    assert largest_error(some, [logits[picked] for logits, picked in zip(expected, rows, strict=True)]) < BOUND


def test_logits_are_the_recorded_ones(golden_folder: Path) -> None:
    checkpoint = golden_folder / "echovlm_tiny"
    found, expected = [], []
    for case in read_cases(checkpoint, Weights(checkpoint).config):
        if case.input_ids.shape[0] > 1:
            continue  # a padded batch is not one sequence
        patches = torch.empty(0, 1176) if case.pixel_values is None else case.pixel_values
        bias = padded_bias(case.attention_mask, case.input_ids.shape[1], torch.float32)
        packed = PackedBatch(case.input_ids, case.position_ids, bias, case.input_ids)
        found += reference_logits(checkpoint, [Batch(patches, list(case.grids), packed)])
        expected.append(case.logits[0])
    assert len(found) == 3
    assert largest_error(found, expected) < BOUND


@pytest.mark.parametrize("changes", [{"moe": None}, {"tie_word_embeddings": True}, {"vocab_size": 300}])
def test_logits_of_other_architectures(save_variant: Callable[..., Path], changes: dict[str, object]) -> None:
    checkpoint = save_variant(**changes)
    model = load_checkpoint(checkpoint)
    batches = [hand_made(model.config, 1), hand_made(model.config, 2, pictured=False), hand_made(model.config, 3)]
    expected = [whole_logits(model, batch) for batch in batches]
    assert largest_error(reference_logits(checkpoint, batches), expected) < BOUND
    assert largest_error(reference_logits(checkpoint, batches[1:2]), expected[1:2]) < BOUND


def test_logits_of_a_sharded_bfloat16_checkpoint(small_config: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    save_checkpoint(init_model(small_config, seed=3), folder, dtype=torch.bfloat16)
    batch = hand_made(small_config, 1)
    expected = whole_logits(load_checkpoint(folder), batch)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {key: f"model-{index % 3}.safetensors" for index, key in enumerate(sorted(tensors))}
    for name in set(files.values()):
        save_file({key: tensor for key, tensor in tensors.items() if files[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_bytes(msgspec.json.encode({"weight_map": files}))
    assert largest_error(reference_logits(folder, [batch]), [expected]) < BOUND


def test_one_block_is_in_memory(tiny_checkpoint: Path, batches: list[Batch]) -> None:
    weights = Weights(tiny_checkpoint)
    alive: list[weakref.ref[nn.Module]] = []
    names = []

    def through(block: Block, passages: Sequence[Passage]) -> None:
        assert all(module() is None for module in alive)
        alive.append(weakref.ref(block.module))
        names.append(block.name)
        for each in passages:
            each.x = block.run(each)

    with torch.no_grad():
        stream(weights, [passage(batch) for batch in batches], through, "test")
    depth, layers = weights.config.vision.depth, weights.config.num_hidden_layers
    vision = ["visual.patch_embed", *(f"visual.blocks.{n}" for n in range(depth)), "visual.merger"]
    assert names == [*vision, *(f"model.layers.{n}" for n in range(layers)), "model.norm"]


def measured(model: EchoVLM, batches: Sequence[Batch]) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Largest inputs and routed tokens, read from the whole model by hooks on its plain layers."""
    ranges: dict[str, float] = {}
    tokens: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        if x.numel():
            ranges[name] = max(ranges.get(name, 0.0), float(x.abs().max()))

    def linear(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, arguments: note(name, arguments[0])

    def mixture(name: str, moe: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            note(f"{name}.experts", x)
            top = moe.get_submodule("gate")(x).topk(2, dim=-1).indices  # [tokens, 2]
            experts = list(moe.get_submodule("experts").children())
            for index, expert in enumerate(experts):
                own = x[(top == index).any(-1)]
                gated = nn.functional.silu(expert.get_submodule("gate_proj")(own)) * expert.get_submodule("up_proj")(
                    own
                )
                note(f"{name}.experts.{index}.down_proj", gated)
            counts = top.flatten().bincount(minlength=len(experts))
            tokens[f"{name}.experts"] = tokens.get(f"{name}.experts", 0) + counts

        return hook

    handles = [model.model.norm.register_forward_hook(lambda _module, _arguments, result: note("lm_head", result))]
    for name, module in model.named_modules():
        if name.endswith("patch_embed"):
            handles.append(module.register_forward_pre_hook(linear(f"{name}.proj")))
        elif name.endswith(".moe"):
            handles.append(module.register_forward_pre_hook(mixture(name, module)))
        elif isinstance(module, nn.Linear) and ".experts." not in name and not name.endswith((*FLOAT, "lm_head")):
            handles.append(module.register_forward_pre_hook(linear(name)))
    for batch in batches:
        whole_logits(model, batch)
    for handle in handles:
        handle.remove()
    return ranges, {name: counts.tolist() for name, counts in tokens.items()}


def smoothed(checkpoint: Path, calibrated: Calibrated) -> EchoVLM:
    model = load_checkpoint(checkpoint)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(calibrated.smoothing.apply(name, parameter))
    return model


@pytest.mark.parametrize("smooth", [False, True])
def test_ranges_and_routes_are_the_whole_models(
    tiny_checkpoint: Path,
    run: Callable[..., Calibrated],
    batches: list[Batch],
    smooth: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_smoothing, "APPLIED_ROWS", 7)
    calibrated = run(smooth=smooth)
    ranges, tokens = measured(smoothed(tiny_checkpoint, calibrated), batches)
    assert calibrated.table.input_maximum == pytest.approx(ranges, rel=ROUNDING)
    assert calibrated.table.expert_tokens == tokens
    assert calibrated.table.frames == FRAMES


def test_cache_ranges_are_those_of_rotated_keys_and_of_values(
    tiny_model: EchoVLM, run: Callable[..., Calibrated], batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sonoedge.export.models import echovlm

    seen: dict[str, float] = {}
    attend = echovlm._attend

    def watched(q: Tensor, k: Tensor, v: Tensor, *, layer: int, **others: object) -> Tensor:
        for name, tensor in ((f"model.layers.{layer}.self_attn.key", k), (f"model.layers.{layer}.self_attn.value", v)):
            seen[name] = max(seen.get(name, 0.0), float(tensor.abs().max()))
        return attend(q, k, v, layer=layer, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(echovlm, "_attend", watched)
    for batch in batches:
        whole_logits(tiny_model, batch)
    assert run().table.cache_maximum == pytest.approx(seen, rel=ROUNDING)


def test_smoothing_leaves_the_function_and_narrows_inputs(
    tiny_checkpoint: Path, tiny_model: EchoVLM, run: Callable[..., Calibrated], batches: list[Batch]
) -> None:
    plain, calibrated = run(), run(smooth=True)
    groups = [group for some in smoothing_groups(tiny_model.config).values() for group in some]
    assert calibrated.table.alphas.keys() == {group.name for group in groups}
    assert any(calibrated.table.alphas.values())
    assert calibrated.table.smoothing_sha256 == calibrated.smoothing.sha256
    assert plain.table.alphas == {}
    assert plain.table.smoothing_sha256 is None
    assert not plain.smoothing.row_factors
    model = smoothed(tiny_checkpoint, calibrated)
    expected = [whole_logits(tiny_model, batch) for batch in batches]
    assert largest_error([whole_logits(model, batch) for batch in batches], expected) < BOUND
    assert calibrated.table.expert_tokens == plain.table.expert_tokens


def test_the_same_inputs_give_the_same_bytes(run: Callable[..., Calibrated]) -> None:
    first, second = run(smooth=True, observer="percentile"), run(smooth=True, observer="percentile")
    assert msgspec.json.encode(first.table) == msgspec.json.encode(second.table)
    assert first.smoothing.sha256 == second.smoothing.sha256


def with_weight(checkpoint: Path, folder: Path, key: str, value: float) -> Path:
    """A copy of the checkpoint in which one weight is `value`."""
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors[key].flatten()[3] = value
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("key", "named", "smooth", "value"),
    [
        ("model.layers.1.self_attn.v_proj.bias", r"model\.layers\.1\.self_attn\.(o_proj|value)", False, float("nan")),
        (
            "model.layers.0.moe.experts.2.up_proj.weight",
            r"model\.layers\.0\.moe\.experts\.2\.down_proj",
            True,
            float("inf"),
        ),
        ("visual.blocks.1.norm2.weight", r"visual\.blocks\.1\.mlp\.fc1", True, float("nan")),
        ("model.norm.weight", r"lm_head", False, float("inf")),
    ],
)
def test_activations_that_are_not_finite_are_named(
    tiny_checkpoint: Path,
    tmp_path: Path,
    run: Callable[..., Calibrated],
    key: str,
    named: str,
    smooth: bool,
    value: float,
) -> None:
    broken = with_weight(tiny_checkpoint, tmp_path / "broken", key, value)
    with pytest.raises(SonoEdgeError, match=f"{named} is not finite"):
        run(broken, smooth=smooth)


def test_too_few_frames_and_too_few_tokens_are_refused(run: Callable[..., Calibrated]) -> None:
    with pytest.raises(SonoEdgeError, match=r"calibration\.frames = 25 and the data holds 24"):
        run(frames=25)
    with pytest.raises(SonoEdgeError, match=r"model\.layers\.0\.moe\.experts"):
        run(least_expert_tokens=100_000)
