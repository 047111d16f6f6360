"""Quantization-aware distillation: a student in cruel ranges gets its answers back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from sonoedge.calibration.pool import PhantomPool, render
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.corpus import Batches, PhantomCorpus
from sonoedge.export.divergence import Reference
from sonoedge.export.fake_quant import fake_quantized
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.models.moe import SparseMoE
from sonoedge.export.qat import Tuned, tune
from sonoedge.export.quantize import products
from sonoedge.export.recipe import Qat
from sonoedge.export.scheme import CacheScheme, QuantizationPlan, Scheme
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CHECKPOINT = Path(__file__).parents[2] / "export" / "demo_checkpoint"
SPEC = ImageSpec(max_pixels=84 * 84)
SETTINGS = Qat(seed=3, steps=4, batch=2, learning_rate=3e-3, warmup_steps=2, temperature=1.0)


def plan_of(model: EchoVLM, threshold: float) -> QuantizationPlan:
    """All products in W8A8, every input cut off at `threshold`."""
    linears, mixtures = products(model)
    names = [*linears, *mixtures, "lm_head"]
    inputs = [*names, *(f"{name}.{expert}.down_proj" for name in mixtures for expert in range(4))]
    caches = [f"{name}.{part}" for name, _ in model.named_modules() for part in ("key", "value")]
    return QuantizationPlan(
        dict.fromkeys(names, Scheme.W8A8),
        dict.fromkeys(inputs, threshold),
        CacheScheme.INT8,
        dict.fromkeys(caches, threshold),
    )


def tuned(
    model: EchoVLM, tokenizer: Tokenizer, frames: PhantomPool, plan: QuantizationPlan, settings: Qat = SETTINGS
) -> Tuned:
    return tune(model, PhantomCorpus(frames, SPEC), tokenizer, SPEC, plan, settings, context=640)


def largest_inputs(model: EchoVLM, run: Callable[[], object]) -> dict[str, float]:
    """The largest input of every product while `run` runs the model."""
    largest: dict[str, float] = {}

    def note(name: str, value: Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(value.abs().max()))

    def note_experts(name: str, module: SparseMoE, x: Tensor) -> None:
        note(name, x)
        for expert, hidden in enumerate(module.expert_hidden(x).unbind(-2)):
            note(f"{name}.{expert}.down_proj", hidden)

    def on_input(function: Callable[..., None], *arguments: object) -> Any:
        return lambda _module, inputs: function(*arguments, inputs[0])

    linears, mixtures = products(model)
    handles = [module.register_forward_pre_hook(on_input(note, name)) for name, module in linears.items()]
    handles += [m.register_forward_pre_hook(on_input(note_experts, name, m)) for name, m in mixtures.items()]
    handles.append(model.model.norm.register_forward_hook(lambda _module, _inputs, result: note("lm_head", result)))
    run()
    for handle in handles:
        handle.remove()
    return largest


def test_a_trained_model_gets_its_answers_back() -> None:
    """Ranges cut at a third take half of what the packaged model knows; a few steps bring most of it back."""
    model = load_checkpoint(CHECKPOINT)
    spec, tokenizer = image_spec(CHECKPOINT), open_tokenizer(CHECKPOINT, model.config)
    made = [render(seed, spec) for seed in range(100, 112)]
    greys, classes = np.stack([frame.grey for frame in made]), np.stack([frame.lesion_classes for frame in made])
    corpus = PhantomCorpus(PhantomPool(100, greys, classes, [frame.truth for frame in made]), spec)
    held = Batches(corpus, tokenizer, spec, size=4, seed=99, context=640).batch(0)
    reference = Reference(model, [held])
    ranges = largest_inputs(model, lambda: reference.compare(model))
    cut = {name: 0.3 * largest for name, largest in ranges.items()}
    linears, mixtures = products(model)
    plan = QuantizationPlan(dict.fromkeys([*linears, *mixtures, "lm_head"], Scheme.W8A8), cut)
    with fake_quantized(model, plan):
        before = reference.compare(model)
    settings = Qat(seed=3, steps=12, batch=2, learning_rate=2e-4, warmup_steps=2, temperature=1.0)
    result = tune(model, corpus, tokenizer, spec, plan, settings, context=640)
    with fake_quantized(result.model, plan):
        after = reference.compare(result.model)
    print(before, after, result.before, result.after)
    assert result.helped
    assert result.after.kl < result.before.kl / 2
    assert after.kl < before.kl / 2
    assert after.top1 > before.top1


def test_equal_inputs_give_equal_copies(tiny_model: EchoVLM, tiny_tokenizer: Tokenizer, frames: PhantomPool) -> None:
    plan = plan_of(tiny_model, 1.0)
    weights = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    first, second = (tuned(tiny_model, tiny_tokenizer, frames, plan) for _ in range(2))
    assert first.helped
    assert (first.before, first.after) == (second.before, second.after)
    states = first.model.state_dict(), second.model.state_dict()
    assert states[0].keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(states[0][key], states[1][key])
        assert torch.equal(tiny_model.state_dict()[key], value)
    assert not torch.equal(states[0]["lm_head.weight"], weights["lm_head.weight"])
    assert not first.model.training


def test_where_nothing_is_lost_nothing_changes(
    tiny_model: EchoVLM, tiny_tokenizer: Tokenizer, frames: PhantomPool
) -> None:
    plan = plan_of(tiny_model, 1.0)
    unrounded = msgspec.structs.replace(
        plan, schemes=dict.fromkeys(plan.schemes, Scheme.FLOAT), cache=CacheScheme.FLOAT
    )
    result = tuned(tiny_model, tiny_tokenizer, frames, unrounded)
    assert result.before.kl == 0
    assert not result.helped
    assert result.model is tiny_model


def test_a_rate_too_high_is_named(tiny_model: EchoVLM, tiny_tokenizer: Tokenizer, frames: PhantomPool) -> None:
    wild = msgspec.structs.replace(SETTINGS, learning_rate=1e30)
    with pytest.raises(SonoEdgeError, match=r"not finite at step \d: lower qat\.learning_rate"):
        tuned(tiny_model, tiny_tokenizer, frames, plan_of(tiny_model, 1.0), wild)
