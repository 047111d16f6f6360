"""What a build decides before it writes: legal schemes, calibration kept for the next run, the search, the tuning."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from sonoedge.calibration.pool import PhantomPool
from sonoedge.calibration.smoothing import Smoothing
from sonoedge.device_profiles import load_profile
from sonoedge.errors import SonoEdgeError
from sonoedge.export import quantizing
from sonoedge.export.checkpoint_files import RANDOM_KEY, image_spec
from sonoedge.export.corpus import PhantomCorpus
from sonoedge.export.divergence import Divergence
from sonoedge.export.layout import EMBEDDING
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.qat import Tuned
from sonoedge.export.quantizing import Quantized, legal_schemes, needs_calibration, quantize, require_legal
from sonoedge.export.recipe import Recipe, load_recipe
from sonoedge.export.scheme import WIDER, Scheme
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
QAT: dict[str, Any] = {
    "seed": 1, "steps": 2, "batch": 2, "learning_rate": 1e-4, "warmup_steps": 0,
    "temperature": 1.0,
}  # fmt: skip
Decide = Callable[..., Quantized]


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    def make(**sections: dict[str, Any]) -> Recipe:
        few = {"frames": 3, "least_expert_tokens": 1} | sections.pop("calibration", {})
        return load_recipe(write_recipe(tmp_path / "r.toml", calibration=few, **sections))

    return make


@pytest.fixture
def decide(tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, frames: PhantomPool, tmp_path: Path) -> Decide:
    """Call `quantize` on the smallest checkpoint and two dozen phantoms."""
    spec = image_spec(tiny_checkpoint)

    def call(
        recipe: Recipe, *, checkpoint: Path = tiny_checkpoint, profile: str = "cpu-x86-64", whole: bool = True
    ) -> Any:
        (tmp_path / "work").mkdir(exist_ok=True)
        corpus = PhantomCorpus(frames, spec)
        work = tmp_path / "work"
        return quantize(checkpoint, recipe, load_profile(profile), corpus, tiny_tokenizer, spec, work, whole=whole)

    return call


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("calibrated")


def test_tensorrt_has_no_scale_for_each_token(recipe: Callable[..., Recipe]) -> None:
    cpu, jetson = load_profile("cpu-x86-64"), load_profile("jetson-agx-orin-64gb")
    assert legal_schemes(cpu) == WIDER
    assert legal_schemes(jetson) == tuple(scheme for scheme in WIDER if scheme is not Scheme.W8A8_DYNAMIC)
    asked = {
        "quantization.default": recipe(quantization={"default": "w8a8-dynamic"}),
        "quantization.schemes.'lm_head'": recipe(quantization={"schemes": {"lm_head": "w8a8-dynamic"}}),
    }
    for key, one in asked.items():
        require_legal(one, cpu)
        with pytest.raises(SonoEdgeError, match=rf"^{key} = 'w8a8-dynamic': jetson-agx-orin-64gb runs tensorrt, which"):
            require_legal(one, jetson)


@pytest.mark.parametrize(
    ("sections", "needed"),
    [
        ({"quantization": {"default": "w8a16"}}, False),
        ({"quantization": {"default": "float"}}, False),
        ({"quantization": {"default": "w8a8-dynamic"}}, False),
        ({"quantization": {"default": "w8a16", "schemes": {"visual": "w8a8"}}}, True),
        ({"quantization": {"default": "w8a16", "cache": "int8"}}, True),
        ({"quantization": {"default": "w8a16"}, "calibration": {"smooth": True}}, True),
        ({}, True),
    ],
)
def test_weights_alone_need_no_calibration(
    recipe: Callable[..., Recipe],
    decide: Decide,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    needed: bool,
) -> None:
    one = recipe(**sections)
    assert needs_calibration(one) == needed
    if not needed:
        monkeypatch.setattr(quantizing, "calibrate", never)
        made = decide(one)
        assert made.table.frames == 0
        assert made.smoothing.sha256 == Smoothing.none().sha256


def test_calibration_is_kept_for_the_next_run(
    recipe: Callable[..., Recipe], decide: Decide, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = recipe(calibration={"smooth": True})
    first = decide(one)
    assert first.checkpoint == tiny_checkpoint
    assert first.table.frames == 3
    assert first.smoothing.row_factors
    assert first.quantized_share == 1.0
    assert first.plan.schemes[EMBEDDING] is Scheme.W8A16
    monkeypatch.setattr(quantizing, "calibrate", never)
    again = decide(one)
    assert again.table.encoded() == first.table.encoded()
    assert again.smoothing.sha256 == first.smoothing.sha256 == first.table.smoothing_sha256
    assert again.plan == first.plan


def respoilt(checkpoint: Path, folder: Path, key: str, fill: float) -> Path:
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[key] = torch.full_like(tensors[key], fill)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_an_expert_that_is_never_chosen_is_named(
    recipe: Callable[..., Recipe], decide: Decide, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Where the router cannot tell experts apart, the same two are taken for every token."""
    spoilt = respoilt(tiny_checkpoint, tmp_path / "spoilt", "model.layers.1.moe.gate.weight", 0.0)
    words = (
        r"calibration gave model.layers.1.moe.experts.\d only 0 tokens of the 1 that calibration.least_expert_tokens"
    )
    with pytest.raises(SonoEdgeError, match=words):
        decide(recipe(), checkpoint=spoilt)
    with pytest.raises(SonoEdgeError, match=r"no range for 'model.layers.1.moe.experts.\d.down_proj'"):
        made = decide(recipe(calibration={"least_expert_tokens": 0}), checkpoint=spoilt)
        for name in [f"model.layers.1.moe.experts.{expert}.down_proj" for expert in range(4)]:
            made.plan.activation_scale(name)


def test_a_random_checkpoint_may_leave_experts_out(
    recipe: Callable[..., Recipe], decide: Decide, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Nobody trusts its answers; benches need a range for every expert."""
    spoilt = respoilt(tiny_checkpoint, tmp_path / "spoilt", "model.layers.1.moe.gate.weight", 0.0)
    config = msgspec.json.decode((spoilt / "config.json").read_bytes())
    (spoilt / "config.json").write_bytes(msgspec.json.encode(config | {RANDOM_KEY: True}))
    made = decide(recipe(), checkpoint=spoilt)
    tokens = made.table.expert_tokens["model.layers.1.moe.experts"]
    assert sorted(tokens)[:2] == [0, 0]
    ranges = [made.table.input_maximum[f"model.layers.1.moe.experts.{expert}.down_proj"] for expert in range(4)]
    seen = [one for one, count in zip(ranges, tokens, strict=True) if count]
    assert all(one == max(seen) for one, count in zip(ranges, tokens, strict=True) if not count)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"quantization": {"schemes": {"visul": "float"}}}, "quantization.schemes names 'visul'"),
        ({"search": {"frames": 1}}, r"\[search\] has no floor to search for"),
    ],
)
def test_a_wrong_recipe_is_told_before_the_slow_part(
    recipe: Callable[..., Recipe], decide: Decide, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(quantizing, "calibrate", never)
    with pytest.raises(SonoEdgeError, match=words):
        decide(recipe(**sections))


@pytest.mark.parametrize("section", ["search", "qat"])
def test_a_model_that_does_not_fit_is_neither_searched_nor_tuned(
    recipe: Callable[..., Recipe], decide: Decide, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    monkeypatch.setattr(quantizing, "calibrate", never)
    asked = recipe(**{section: {"frames": 1} if section == "search" else QAT})
    with pytest.raises(SonoEdgeError, match=rf"^\[{section}\] needs the whole model in memory"):
        decide(asked, whole=False)


def test_too_few_frames_are_told(recipe: Callable[..., Recipe], decide: Decide) -> None:
    with pytest.raises(SonoEdgeError, match=r"calibration.frames = 99 and the data holds 24"):
        decide(recipe(calibration={"frames": 99}))


def floor(**asked: float) -> dict[str, Any]:
    return {"first_frame_seed": 1, "frames": 1} | asked


def test_the_search_widens_what_the_device_can_run(recipe: Callable[..., Recipe], decide: Decide) -> None:
    """A floor that only a nearly float model holds, on a device without dynamic scales."""
    wide = {"schemes": {EMBEDDING: "float"}}  # embeddings are no product that the search could widen
    one = recipe(search={"frames": 2}, fidelity=floor(largest_kl=1e-5), quantization=wide)
    made = decide(one, profile="jetson-orin-nano-8gb")
    assert made.trace is not None
    assert made.trace.met
    assert made.trace.end.kl <= 1e-5 < made.trace.start.kl
    assert made.trace.moves
    assert Scheme.W8A8_DYNAMIC not in made.plan.schemes.values()
    assert {move.source for move in made.trace.moves} >= {Scheme.W8A8}


def test_a_search_that_misses_is_refused(recipe: Callable[..., Recipe], decide: Decide) -> None:
    one = recipe(search={"frames": 1, "memory_budget_bytes": 1}, fidelity=floor(largest_kl=1e-9))
    words = (
        r"search ends below the floor: kl is .*: raise search.memory_budget_bytes, lower the floor in \[fidelity\], or"
    )
    with pytest.raises(SonoEdgeError, match=words):
        decide(one)


@pytest.mark.parametrize("helped", [True, False])
def test_a_tuned_checkpoint_is_written_in_place_of_the_given_one(
    recipe: Callable[..., Recipe], decide: Decide, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, helped: bool
) -> None:
    """With the smoothing folded in; where tuning did not help, nothing changes."""
    lost, kept = (Divergence(kl, 0.5, 0.5) for kl in (0.2, 0.1))
    given: list[EchoVLM] = []

    def tune(model: EchoVLM, *_: Any, context: int) -> Tuned:
        assert context == 640
        given.append(model)
        return Tuned(model, lost, kept if helped else lost)

    monkeypatch.setattr(quantizing, "tune", tune)
    made = decide(recipe(qat=QAT, calibration={"smooth": True}))
    assert made.tuning is not None
    assert made.tuning.helped == helped
    assert made.plan.input_maximum
    assert (made.checkpoint == tiny_checkpoint) == (not helped)
    assert bool(made.smoothing.row_factors) == (not helped)
    if helped:
        written = load_checkpoint(made.checkpoint).state_dict()
        assert all(torch.equal(tensor, written[key]) for key, tensor in given[0].state_dict().items())
        original = load_checkpoint(tiny_checkpoint).state_dict()
        assert not torch.equal(original["model.norm.weight"], written["model.norm.weight"])


def test_a_smoothed_model_is_the_same_function(
    recipe: Callable[..., Recipe], decide: Decide, tiny_checkpoint: Path
) -> None:
    made = decide(recipe(calibration={"smooth": True}))
    plain, smoothed = load_checkpoint(tiny_checkpoint), load_checkpoint(tiny_checkpoint)
    quantizing._smooth(smoothed, made.smoothing)
    ids, positions = torch.arange(5, 30)[None], torch.arange(25).expand(3, 1, 25)
    with torch.no_grad():
        wanted, found = (model(ids, positions).logits for model in (plain, smoothed))
    assert not torch.equal(found, wanted)
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
