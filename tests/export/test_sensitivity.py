"""The sensitivity search: on blocks whose losses are known, and on a model with one block spoilt."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sonoedge.calibration.pool import PhantomPool
from sonoedge.export.corpus import Batch, Batches, PhantomCorpus
from sonoedge.export.divergence import Divergence, Reference, evaluator, real_tokens
from sonoedge.export.fake_quant import fake_quantized
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.quantize import products
from sonoedge.export.scheme import WIDER, CacheScheme, QuantizationPlan, Scheme, quantize_weight
from sonoedge.export.sensitivity import Floor, Trace, blocks_of, search, weight_bytes_of
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ImageSpec(max_pixels=84 * 84)
NAMES = ["visual.blocks.0.mlp.fc1", "visual.blocks.0.mlp.fc2", "model.layers.0.self_attn.q_proj", "lm_head"]
# What a product loses in each scheme, narrowest first.
LOSSES = {
    NAMES[0]: (0.5, 0.2, 0.1, 0.05, 0.0),
    NAMES[1]: (0.1, 0.1, 0.1, 0.05, 0.0),
    NAMES[2]: (0.4, 0.3, 0.3, 0.3, 0.0),
    NAMES[3]: (0.01, 0.0, 0.0, 0.0, 0.0),
}
VISUAL, ATTENTION = "visual.blocks.0", "model.layers.0.self_attn"


def known(plan: QuantizationPlan) -> Divergence:
    kl = sum(LOSSES[name][WIDER.index(scheme)] for name, scheme in plan.schemes.items())
    kl += 0.7 * (plan.cache is CacheScheme.INT8)
    return Divergence(kl, 1 - kl / 10, 1 - kl / 20)


def bytes_of(name: str, scheme: Scheme) -> int:
    return 400 if scheme is Scheme.FLOAT else 104 if scheme is Scheme.W8A16_BLOCK else 100


def plan_of(*schemes: Scheme) -> QuantizationPlan:
    return QuantizationPlan(dict(zip(NAMES, schemes, strict=True)), {}, CacheScheme.FLOAT, {})


NARROW = plan_of(*[Scheme.W8A8] * 4)


def found(
    floor: Floor, *, plan: QuantizationPlan = NARROW, budget: int | None = None, ladder: tuple[Scheme, ...] = WIDER
) -> tuple[QuantizationPlan, Trace]:
    return search(known, plan, blocks_of(NAMES), bytes_of, floor, budget, ladder)


def test_a_plan_that_meets_the_floor_stays() -> None:
    plan, trace = found(Floor(largest_kl=1.1))
    assert plan == NARROW
    assert trace.met
    assert trace.moves == ()
    assert list(trace.alone) == [VISUAL, ATTENTION, "lm_head"]
    assert trace.alone[VISUAL].kl == pytest.approx(0.6)
    assert trace.start == trace.end
    assert trace.weight_bytes == 400


def test_the_worst_block_moves_first_and_no_further_than_needed() -> None:
    plan, trace = found(Floor(largest_kl=0.55))
    moves = [(move.block, move.source.value, move.target.value) for move in trace.moves]
    assert moves == [
        (VISUAL, "w8a8", "w8a8-dynamic"),  # 0.6 alone, then 0.3
        (ATTENTION, "w8a8", "w8a8-dynamic"),  # 0.4, then 0.3, level with the block before it in the model
        (VISUAL, "w8a8-dynamic", "w8a16"),  # then 0.2
    ]
    assert [move.after.kl for move in trace.moves] == pytest.approx([0.71, 0.61, 0.51])
    assert [move.before.kl for move in trace.moves] == pytest.approx([1.01, 0.71, 0.61])
    assert trace.met
    assert known(plan) == trace.end
    assert msgspec.json.decode(msgspec.json.encode(trace), type=Trace) == trace


def test_the_budget_sends_the_search_to_the_next_block() -> None:
    """Float attention would fit, float vision would not."""
    plan, trace = found(Floor(largest_kl=0.12), budget=720)
    assert trace.met
    assert plan.schemes[NAMES[2]] is Scheme.FLOAT
    assert plan.schemes[NAMES[0]] is Scheme.W8A16_BLOCK
    assert max(move.weight_bytes for move in trace.moves) <= 720


def test_what_is_missed_is_told() -> None:
    floor = Floor(largest_kl=0.1, least_top1=0.999, least_router=0.9)
    plan, trace = found(floor, budget=420)
    assert not trace.met
    assert trace.missed == (
        "kl is 0.4, above largest_kl = 0.1",
        "top1 is 0.9600, below least_top1 = 0.999",
    )
    assert Scheme.FLOAT not in plan.schemes.values()
    _, trace = found(Floor(), budget=300)
    assert trace.missed == ("weights take 400 bytes, above memory_budget_bytes = 300",)
    _, trace = found(Floor(largest_kl=0.5, least_router=0.99), plan=plan_of(*[Scheme.FLOAT] * 4))
    assert trace.met
    assert Floor(largest_kl=1.0).missed(Divergence(float("nan"), 1.0, 1.0))


def test_only_schemes_that_the_target_runs_are_used() -> None:
    _, trace = found(Floor(largest_kl=0.0), ladder=(Scheme.W8A8, Scheme.W8A16, Scheme.FLOAT))
    assert {move.target for move in trace.moves} == {Scheme.W8A16, Scheme.FLOAT}
    assert trace.met


def test_in_a_mixed_block_the_narrowest_products_move() -> None:
    plan, trace = found(Floor(largest_kl=0.75), plan=plan_of(Scheme.W8A8, Scheme.W8A16, Scheme.W8A8, Scheme.W8A8))
    assert [(move.block, move.target) for move in trace.moves] == [(VISUAL, Scheme.W8A8_DYNAMIC)]
    assert plan.schemes[NAMES[1]] is Scheme.W8A16


def test_the_cache_has_a_line_of_its_own() -> None:
    plan, trace = found(Floor(), plan=msgspec.structs.replace(NARROW, cache=CacheScheme.INT8))
    assert trace.cache is not None
    assert trace.cache.kl == pytest.approx(0.7)
    assert trace.start.kl == pytest.approx(1.71)
    assert trace.alone[ATTENTION].kl == pytest.approx(0.4)
    assert plan.cache is CacheScheme.INT8


@given(
    st.lists(st.floats(0, 1), min_size=20, max_size=20),
    st.floats(0, 2),
    st.none() | st.integers(0, 1700),
    st.lists(st.sampled_from(WIDER), min_size=4, max_size=4),
)
def test_any_search_ends_within_its_budget(
    costs: list[float], largest: float, budget: int | None, schemes: list[Scheme]
) -> None:
    def evaluate(plan: QuantizationPlan) -> Divergence:
        kl = sum(costs[5 * n + WIDER.index(plan.schemes[name])] for n, name in enumerate(NAMES))
        return Divergence(kl, 1.0, 1.0)

    begun, floor = plan_of(*schemes), Floor(largest_kl=largest)
    plan, trace = search(evaluate, begun, blocks_of(NAMES), bytes_of, floor, budget)
    total = sum(bytes_of(*item) for item in plan.schemes.items())
    assert trace.weight_bytes == total
    assert trace.met == (evaluate(plan).kl <= largest and (budget is None or total <= budget))
    assert all(budget is None or move.weight_bytes <= budget for move in trace.moves)
    for name in NAMES:
        assert WIDER.index(plan.schemes[name]) >= WIDER.index(begun.schemes[name])


def test_blocks_of_a_model(tiny_model: EchoVLM) -> None:
    linears, mixtures = products(tiny_model)
    blocks = blocks_of([*linears, *mixtures, "lm_head"])
    assert sum(len(block) for block in blocks.values()) == len(linears) + len(mixtures) + 1
    assert blocks["model.layers.0.moe.experts"] == ("model.layers.0.moe.experts",)
    assert blocks["model.layers.1.moe.shared_expert"] == tuple(
        f"model.layers.1.moe.shared_expert.{part}_proj" for part in ("gate", "up", "down")
    )
    assert {"visual.patch_embed", "visual.blocks.0", "visual.merger", "model.layers.1.mlp"} < blocks.keys()


def test_weight_bytes_are_those_of_the_tensors(tiny_model: EchoVLM) -> None:
    count = weight_bytes_of(tiny_model)
    experts = tiny_model.get_submodule("model.layers.0.moe.experts")
    tensors: dict[str, list[Tensor]] = {
        "visual.patch_embed.proj": [tiny_model.visual.patch_embed.proj.weight.flatten(1)],
        "visual.merger.mlp.0": [tiny_model.get_parameter("visual.merger.mlp.0.weight")],
        "model.layers.0.moe.experts": list(experts.parameters()),
        "lm_head": [tiny_model.lm_head.weight],
    }
    for name, weights in tensors.items():
        arrays = [weight.detach().numpy() for weight in weights]
        assert count(name, Scheme.FLOAT) == sum(array.nbytes for array in arrays)
        for scheme, block in ((Scheme.W8A8, None), (Scheme.W8A16, None), (Scheme.W8A16_BLOCK, 128)):
            wanted = sum(part.nbytes for array in arrays for part in quantize_weight(array, block))
            assert count(name, scheme) == wanted, (name, scheme)


@pytest.fixture
def batches(tiny_tokenizer: Tokenizer, frames: PhantomPool) -> list[Batch]:
    made = Batches(PhantomCorpus(frames, SPEC), tiny_tokenizer, SPEC, size=3, seed=4, context=640)
    return [batch for _, batch in made.steps(0, 2)]


def full_plan(model: EchoVLM, scheme: Scheme) -> QuantizationPlan:
    linears, mixtures = products(model)
    names = [*linears, *mixtures, "lm_head"]
    inputs = [*names, *(f"{name}.{expert}.down_proj" for name in mixtures for expert in range(4))]
    return QuantizationPlan(dict.fromkeys(names, scheme), dict.fromkeys(inputs, 8.0), CacheScheme.FLOAT, {})


def test_divergence_is_what_numpy_counts(tiny_model: EchoVLM, batches: list[Batch]) -> None:
    plan = full_plan(tiny_model, Scheme.W8A8)
    evaluate = evaluator(tiny_model, batches)
    assert evaluate(full_plan(tiny_model, Scheme.FLOAT)) == Divergence(0.0, 1.0, 1.0)
    divergence = evaluate(plan)
    kl, same, sets = [], [], []
    for batch in batches:
        for row in range(batch.packed.input_ids.shape[0]):
            outputs = []
            length = int(real_tokens(batch.packed)[row].sum())
            images = batch.patches.shape[0] // batch.packed.input_ids.shape[0]
            with torch.no_grad():
                for scheme in (Scheme.FLOAT, Scheme.W8A8):
                    with fake_quantized(
                        tiny_model, msgspec.structs.replace(plan, schemes=full_plan(tiny_model, scheme).schemes)
                    ):
                        embeds = tiny_model.encode_images(
                            batch.patches[row * images : (row + 1) * images], batch.grids[row : row + 1]
                        )
                        outputs.append(
                            tiny_model(
                                batch.packed.input_ids[row : row + 1, :length],
                                batch.packed.positions[:, row : row + 1, :length],
                                image_embeds=embeds,
                                attention_bias=batch.packed.attention_bias[row : row + 1, :, :length, :length],
                                collect_router=True,
                            )
                        )
            answers = (batch.packed.labels[row, :length] >= 0).numpy()
            p, q = (np.exp(o.logits[0].double().numpy()[answers]) for o in outputs)
            p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
            kl += list((p * np.log(p / q)).sum(-1))
            same += list(p.argmax(-1) == q.argmax(-1))
            for before, after in zip(outputs[0].router_logits, outputs[1].router_logits, strict=True):
                chosen = [np.sort(np.argsort(r[0].numpy(), -1)[:, -2:], -1) for r in (before, after)]
                sets += list((chosen[0] == chosen[1]).all(-1))
    print(divergence)
    assert divergence.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert divergence.top1 == pytest.approx(np.mean(same))
    assert divergence.router == pytest.approx(np.mean(sets))
    assert divergence.kl > 0
    assert divergence.top1 < 1


def test_a_tuned_model_is_compared_with_the_float_one(tiny_model: EchoVLM, batches: list[Batch]) -> None:
    reference = Reference(tiny_model, batches)
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(1.1)
    changed = reference.compare(tiny_model)
    assert changed.kl > 0
    assert changed.top1 == changed.router == 1.0


def test_the_spoilt_block_is_found_and_widened(tiny_model: EchoVLM, batches: list[Batch]) -> None:
    plan = full_plan(tiny_model, Scheme.W8A8)
    block = "model.layers.1.mlp"
    spoilt = {name: 0.01 if name.startswith(block) else value for name, value in plan.input_maximum.items()}
    plan = msgspec.structs.replace(plan, input_maximum=spoilt)
    evaluate = evaluator(tiny_model, batches[:1])
    whole = evaluate(plan)
    healed, trace = search(
        evaluate, plan, blocks_of(plan.schemes), weight_bytes_of(tiny_model), Floor(largest_kl=whole.kl / 4), None
    )
    print({name: f"{loss.kl:.2e}" for name, loss in trace.alone.items()})
    assert next(iter(trace.alone)) == block
    assert [move.block for move in trace.moves] == [block]
    assert trace.met
    assert healed.schemes[f"{block}.up_proj"] is Scheme.W8A8_DYNAMIC
