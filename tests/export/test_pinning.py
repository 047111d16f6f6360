"""Pinned and merged experts: the routing they are chosen by, the checkpoint that is written, and what it computes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export import merging, pinning
from sonoedge.export.checkpoint_files import image_spec, is_random
from sonoedge.export.corpus import Batch, PhantomCorpus
from sonoedge.export.merging import merge_experts, require_small
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint, open_checkpoint, save_checkpoint
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.pinning import choose_experts, mass_kept, write_pinned
from sonoedge.export.preset import alone
from sonoedge.export.routing_survey import Mixture, Use, heaviest, survey_routing
from sonoedge.export.streamed_model import passage
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 640
LAYERS = 3
BOUND = 1e-5  # of the largest logit: a product over fewer experts sums in another order


@pytest.fixture
def batches(tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, frames: PhantomPool) -> list[Batch]:
    """Four phantoms with their questions."""
    spec = image_spec(tiny_checkpoint)
    few = PhantomPool(100, frames.greys[:4], frames.classes[:4], frames.truths[:4])
    return alone(PhantomCorpus(few, spec), tiny_tokenizer, spec, CONTEXT)


@torch.no_grad()
def logits_of(model: EchoVLM, batch: Batch) -> Tensor:
    """Logits [s, vocab] of the whole model in memory."""
    packed = batch.packed
    embeds = model.encode_images(batch.patches, batch.grids)
    output = model(packed.input_ids, packed.positions, image_embeds=embeds, attention_bias=packed.attention_bias)
    logits: Tensor = output.logits[0]
    return logits


def mixtures_of(*experts: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{layer}.moe.experts": kept for layer, kept in enumerate(experts)}


def without_others(model: EchoVLM, kept: dict[str, tuple[int, ...]]) -> EchoVLM:
    """The same model whose router cannot choose but `kept`."""
    for layer, experts in zip(model.model.layers, kept.values(), strict=True):
        moe = layer.get_submodule("moe")
        assert isinstance(moe, SparseMoE)

        def route(router_logits: Tensor, experts: tuple[int, ...] = experts) -> Tensor:
            gone = torch.full_like(router_logits, -torch.inf)
            gone[..., list(experts)] = router_logits[..., list(experts)]
            weights = functional.softmax(gone, dim=-1, dtype=torch.float32)
            chosen, index = torch.topk(weights, min(2, len(experts)), dim=-1)
            return torch.zeros_like(weights).scatter(-1, index, chosen)

        moe.route = route  # type: ignore[method-assign]
    return model


def test_all_experts_are_the_same_checkpoint_bit_for_bit(tiny_checkpoint: Path, tmp_path: Path) -> None:
    kept = mixtures_of(*[(0, 1, 2, 3)] * LAYERS)
    size = write_pinned(tiny_checkpoint, kept, tmp_path / "pinned", {})
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, tmp_path / "pinned"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype is tensor.dtype
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert size == sum(tensor.nbytes for tensor in after.values())
    assert open_checkpoint(tmp_path / "pinned")[0] == open_checkpoint(tiny_checkpoint)[0]
    assert image_spec(tmp_path / "pinned") == image_spec(tiny_checkpoint)
    assert (tmp_path / "pinned" / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "kept", [((0, 1, 3), (1, 2, 3), (0, 1, 2)), ((1, 3), (0, 2), (0, 1)), ((2,), (1,), (3,))], ids=["3", "2", "1"]
)
def test_fewer_experts_compute_what_the_model_does_without_the_others(
    tiny_checkpoint: Path,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: tuple[tuple[int, ...], ...],
) -> None:
    monkeypatch.setattr(pinning, "CHUNK_VALUES", 700)  # a few rows at a time, of the router one
    chosen = mixtures_of(*kept)
    size = write_pinned(tiny_checkpoint, chosen, tmp_path / "pinned", {})
    config, headers = open_checkpoint(tmp_path / "pinned")
    assert config.moe is not None
    assert config.moe.num_experts == len(kept[0])
    assert config.moe.num_experts_per_tok == min(2, len(kept[0]))
    assert size == sum(header.bytes for header in headers.values())
    pinned, others_gone = load_checkpoint(tmp_path / "pinned"), without_others(load_checkpoint(tiny_checkpoint), chosen)
    whole = load_checkpoint(tiny_checkpoint)
    for batch in batches:
        found, expected = logits_of(pinned, batch), logits_of(others_gone, batch)
        assert float((found - expected).abs().max() / expected.abs().max()) < BOUND
        assert not torch.allclose(found, logits_of(whole, batch), rtol=1e-3), "the experts that went make no difference"


def test_half_precision_and_the_mark_of_random_weights_stay(small_config: ModelConfig, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    model = init_model(small_config, seed=2)

    save_checkpoint(model, folder, dtype=torch.bfloat16, extra_config={"sonoedge_random": True})
    kept = mixtures_of((0, 4), (1, 2))
    write_pinned(folder, kept, tmp_path / "pinned", {})
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "pinned"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert is_random(tmp_path / "pinned")
    router = "model.layers.0.moe.gate.weight"
    assert torch.equal(after[router], before[router][[0, 4]])
    second = "model.layers.1.moe.experts.{}.up_proj.weight"
    assert torch.equal(after[second.format(1)], before[second.format(2)])
    assert second.format(2) not in after


def test_the_survey_counts_what_the_model_routes(
    tiny_checkpoint: Path, tiny_model: EchoVLM, batches: list[Batch]
) -> None:
    """Two samples of the region and two of others, against router weights of the whole model in memory."""
    regions = ["thyroid", None, "thyroid", "liver"]
    passages = [passage(batch, region) for batch, region in zip(batches, regions, strict=True)]
    mixtures = survey_routing(tiny_checkpoint, passages, "thyroid")
    assert [mixture.name for mixture in mixtures] == list(mixtures_of((), (), ()))
    routed: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for layer, seen in zip(tiny_model.model.layers, routed, strict=True):
        moe = layer.get_submodule("moe")
        assert isinstance(moe, SparseMoE)
        moe.gate.register_forward_hook(
            lambda _gate, _given, logits, moe=moe, seen=seen: seen.append(moe.route(logits)[0])
        )
    for batch in batches:
        logits_of(tiny_model, batch)
    token = tiny_model.config.image_token_id
    images = [batch.packed.input_ids[0] == token for batch in batches]
    for mixture, seen in zip(mixtures, routed, strict=True):
        wanted = {
            "image": torch.cat([seen[index][images[index]] for index in (0, 2)]),
            "text": torch.cat([seen[index][~images[index]] for index in (0, 2)]),
            "elsewhere": torch.cat([seen[1], seen[3]]),
        }
        for part, weights in wanted.items():
            use = getattr(mixture, part)
            assert use.tokens == len(weights)
            assert use.mass == pytest.approx(weights.sum(0).tolist(), rel=1e-4)
            assert sum(use.chosen) == 2 * len(weights)
        assert sum(mixture.use.shares) == pytest.approx(1)
        assert 0 <= mixture.image.distance(mixture.text) <= 1
    assert survey_routing(tiny_checkpoint, [passage(batches[0], "thyroid")], "thyroid")[0].elsewhere is None


uses = st.lists(st.floats(0, 1e3), min_size=4, max_size=4).map(lambda mass: Use(9, (1, 1, 1, 1), tuple(mass)))


@given(st.lists(st.tuples(uses, uses), min_size=1, max_size=5), st.floats(0.01, 1))
def test_a_share_of_mass_is_covered_in_every_layer_and_by_no_expert_too_many(
    pairs: list[tuple[Use, Use]], share: float
) -> None:
    mixtures = [Mixture(f"model.layers.{index}.moe.experts", *pair) for index, pair in enumerate(pairs)]
    kept = choose_experts(mixtures, experts=None, mass=share)
    count = len(kept[mixtures[0].name])
    assert {len(experts) for experts in kept.values()} == {count}
    covered = [mass_kept(mixture, kept[mixture.name]) >= share for mixture in mixtures]
    assert all(covered) or count == 4
    if count > 1:
        fewer = choose_experts(mixtures, experts=count - 1, mass=None)
        assert not all(mass_kept(mixture, fewer[mixture.name]) >= share for mixture in mixtures)
    for mixture in mixtures:
        gone = set(range(4)) - set(kept[mixture.name])
        assert all(mixture.use.mass[out] <= mixture.use.mass[held] for out in gone for held in kept[mixture.name])
        assert kept[mixture.name] == tuple(sorted(kept[mixture.name]))


def test_of_equals_the_first_stay() -> None:
    assert heaviest(Use(4, (1, 1, 1, 1), (2.0, 5.0, 2.0, 2.0)), 3) == (0, 1, 2)
    with pytest.raises(SonoEdgeError, match=r"preset\.experts = 5 and the model has 4 in a layer: ask for at most 4"):
        use = Use(4, (1, 1, 1, 1), (1.0, 1.0, 1.0, 1.0))
        choose_experts([Mixture("m", use, use)], experts=5, mass=None)


def test_merged_experts_come_closer_and_their_weights_are_the_least_squares_solution(
    tiny_checkpoint: Path, tiny_model: EchoVLM, batches: list[Batch], tmp_path: Path
) -> None:
    """Each layer's own output, at the inputs of the whole model, against those of plain pinning and of lstsq."""
    kept = mixtures_of((1, 3), (0, 2), (2, 3))
    write_pinned(tiny_checkpoint, kept, tmp_path / "pinned", {})
    replaced = merge_experts(tiny_checkpoint, [passage(batch) for batch in batches], kept, tmp_path / "merged")
    write_pinned(tiny_checkpoint, kept, tmp_path / "out", replaced)
    pinned, merged = (load_checkpoint(tmp_path / name) for name in ("pinned", "out"))
    inputs: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for layer, seen in zip(tiny_model.model.layers, inputs, strict=True):
        layer.get_submodule("moe").register_forward_pre_hook(lambda _moe, given, seen=seen: seen.append(given[0][0]))
    for batch in batches:
        logits_of(tiny_model, batch)
    for index, seen in enumerate(inputs):
        x = torch.cat(seen)
        whole, plain, solved = (_mixture(model, index) for model in (tiny_model, pinned, merged))
        with torch.no_grad():
            wanted = whole(x)[0]
            off = {name: float((moe(x)[0] - wanted).square().sum()) for name, moe in (("p", plain), ("m", solved))}
            assert off["m"] < 0.8 * off["p"]
            # The same problem, ridge rows and all, by another method.
            hidden = plain.expert_hidden(x) * plain.route(plain.gate(x)).unsqueeze(-1)
            columns = hidden.flatten(-2).double()  # [n, K · I]
            ridge = (merging.RIDGE * columns.square().sum(0).mean()).sqrt()
            rows = torch.cat([columns, ridge * torch.eye(columns.shape[1], dtype=torch.float64)])
            missing = (wanted - plain(x)[0]).double()
            target = torch.cat([missing, torch.zeros(columns.shape[1], missing.shape[1], dtype=torch.float64)])
            change = torch.linalg.lstsq(rows, target).solution.T
        down = [torch.cat([_down(moe, expert) for expert in range(2)], dim=1) for moe in (plain, solved)]
        assert torch.allclose(down[1], down[0] + change.float(), atol=1e-4 * float(down[0].abs().max()))
        for expert in range(2):  # the rest of an expert stays
            for part in ("gate_proj", "up_proj"):
                path = f"experts.{expert}.{part}.weight"
                assert torch.equal(solved.get_parameter(path), plain.get_parameter(path))


def test_experts_too_wide_to_be_solved_for_are_refused(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = open_checkpoint(tiny_checkpoint)
    require_small(config, 3)
    monkeypatch.setattr(merging, "MOST_COLUMNS", 143)
    with pytest.raises(SonoEdgeError, match="solves for 3 experts of 48 columns at once, 144 and at most 143: use"):
        require_small(config, 3)


def _mixture(model: EchoVLM, layer: int) -> SparseMoE:
    moe = model.model.layers[layer].get_submodule("moe")
    assert isinstance(moe, SparseMoE)
    return moe


def _down(moe: SparseMoE, expert: int) -> Tensor:
    return moe.get_parameter(f"experts.{expert}.down_proj.weight").detach()
