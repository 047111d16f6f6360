"""The lesson: any split of a batch adds up, recomputing changes nothing, projections stay out, mismatches are told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from sonoedge.errors import SonoEdgeError
from sonoedge.export.corpus import Batches, ConversationCorpus
from sonoedge.export.distilling.draws import Draws, Pass
from sonoedge.export.distilling.lesson import LOAD, Lesson, even_load, wanted_outputs
from sonoedge.export.distilling.taught import ask
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint
from sonoedge.export.recipe import Distillation, load_recipe
from sonoedge.export.student import cut_student
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ImageSpec(max_pixels=84 * 84)


@pytest.fixture
def settings(small_recipe: Callable[..., Path]) -> Distillation:
    found = load_recipe(small_recipe()).distill
    assert found is not None
    return found


@pytest.fixture
def student(tiny_model: EchoVLM, small_recipe: Callable[..., Path]) -> EchoVLM:
    shape = load_recipe(small_recipe()).student
    assert shape is not None
    return cut_student(tiny_model, shape)


@pytest.fixture
def passes(cases: Path, tiny_tokenizer: Tokenizer) -> Callable[[int], list[Pass]]:
    """Eight draws in passes of at most so many."""
    corpus = ConversationCorpus(cases, SPEC)
    collator = Batches(corpus, tiny_tokenizer, SPEC, size=8, seed=0, context=400)
    return lambda most: Draws(corpus, collator, seed=1).passes(range(8), most)


def sums(lesson: Lesson, teacher: EchoVLM, made: list[Pass]) -> dict[str, torch.Tensor]:
    """All losses over some passes, their gradients left in the lesson."""
    lesson.zero_grad()
    wanted = wanted_outputs(lesson.student.config, teacher.config, lesson.settings)
    total: dict[str, torch.Tensor] = {}
    for item in made:
        found = lesson(item.batch, ask(teacher, item.batch, wanted), even_load(lesson.student.config), False)
        torch.stack([loss for name, loss in found.items() if name != LOAD]).sum().backward()
        for name, loss in found.items():
            total[name] = total.get(name, torch.zeros(())) + loss.detach()
    return total


def gradients(lesson: Lesson) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in lesson.named_parameters() if p.grad is not None}


def test_losses_and_gradients_add_up_over_any_passes(
    student: EchoVLM, tiny_model: EchoVLM, settings: Distillation, passes: Callable[[int], list[Pass]]
) -> None:
    lesson = Lesson(student, tiny_model.config, settings)
    whole, by_hand = sums(lesson, tiny_model, passes(8)), gradients(lesson)
    assert len(passes(8)) < len(passes(1)) == 8
    split = sums(lesson, tiny_model, passes(1))
    assert set(whole) == {"embeds", "answers", "logits", "hidden", "router", "balance", LOAD}
    for name, value in whole.items():
        assert torch.allclose(value, split[name], rtol=1e-4, atol=1e-5), name
    for name, gradient in gradients(lesson).items():
        assert torch.allclose(gradient, by_hand[name], rtol=1e-3, atol=1e-4), name


def test_recomputing_changes_no_loss_and_no_gradient(
    student: EchoVLM, tiny_model: EchoVLM, settings: Distillation, passes: Callable[[int], list[Pass]]
) -> None:
    plain = Lesson(student, tiny_model.config, settings)
    wanted, by_hand = sums(plain, tiny_model, passes(8)), gradients(plain)
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        sums(plain, tiny_model, passes(8))
    kept = len(saved)
    again = Lesson(student, tiny_model.config, msgspec.structs.replace(settings, recompute=True))
    found = sums(again, tiny_model, passes(8))
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    assert all(torch.equal(gradient, by_hand[name]) for name, gradient in gradients(again).items())
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        item = passes(8)[0]
        wanted_of = wanted_outputs(student.config, tiny_model.config, settings)
        again(item.batch, ask(tiny_model, item.batch, wanted_of), even_load(student.config), False)
    assert len(saved) < kept / 2


def test_bf16_stays_near(
    student: EchoVLM, tiny_model: EchoVLM, settings: Distillation, passes: Callable[[int], list[Pass]]
) -> None:
    exact = sums(Lesson(student, tiny_model.config, settings), tiny_model, passes(8))
    lesson = Lesson(student, tiny_model.config, msgspec.structs.replace(settings, precision="bf16"))
    found = sums(lesson, tiny_model, passes(8))
    assert all(gradient.dtype == torch.float32 for gradient in gradients(lesson).values())
    for name in ("embeds", "answers", "logits", "hidden"):
        assert found[name] != exact[name]
        assert found[name] == pytest.approx(float(exact[name]), rel=0.05), name


@pytest.mark.parametrize("options", [{"accumulate": 4, "recompute": True}, {"precision": "bf16"}])
def test_options_train_and_projections_stay_out_of_the_student(
    tiny_checkpoint: Path, cases: Path, small_recipe: Callable[..., Path], sonoedge: Any, runs: Any, tmp_path: Path,
    options: dict[str, Any],
) -> None:  # fmt: skip
    for name, recipe in (("plain", small_recipe("p.toml")), ("changed", small_recipe("c.toml", **options))):
        ran = sonoedge("distill", tiny_checkpoint, "--recipe", recipe, "--data", cases, "--out", tmp_path / name)
        assert ran.status == 0, ran.err
    weights = load_checkpoint(tmp_path / "changed").state_dict()
    assert not any("matching" in name for name in weights)
    found = runs.farthest(runs.steps(tmp_path / "plain"), runs.steps(tmp_path / "changed"))
    print(f"{options}: {found:.2g}")
    assert found < (1e-4 if "accumulate" in options else 0.1)


def test_another_vocabulary_is_refused_where_logits_are_compared(student: EchoVLM, settings: Distillation) -> None:
    smaller = msgspec.structs.replace(student.config, vocab_size=500)
    with pytest.raises(
        SonoEdgeError, match=r"vocabulary has 500 tokens and the teacher's 512, .*logits_weight.*set it"
    ):
        wanted_outputs(smaller, student.config, settings)
    wanted_outputs(smaller, student.config, msgspec.structs.replace(settings, logits_weight=0.0))


def test_a_narrower_student_is_matched_through_projections(
    tiny_model: EchoVLM, settings: Distillation, passes: Callable[[int], list[Pass]]
) -> None:
    """Another width and other experts: only what compares like with like is left out."""
    teacher = tiny_model.config
    assert teacher.moe is not None
    config = msgspec.structs.replace(
        teacher,
        hidden_size=48,
        num_attention_heads=3,
        num_key_value_heads=1,
        num_hidden_layers=2,
        vision=msgspec.structs.replace(teacher.vision, hidden_size=48),
        moe=msgspec.structs.replace(teacher.moe, num_experts=3),
    )
    student = init_model(config, 3)
    with pytest.raises(SonoEdgeError, match=r"image tokens have 48 values and the teacher's 64"):
        wanted_outputs(config, teacher, settings)
    changed = msgspec.structs.replace(settings, embeds_weight=0.0, vision_steps=0)
    lesson = Lesson(student, teacher, changed)
    found = sums(lesson, tiny_model, passes(8))
    assert {"hidden", "router"} <= set(found)
    made = gradients(lesson)
    assert made["matching.hidden.0.weight"].shape == (64, 48)
    assert made["matching.router.1.weight"].shape == (teacher.moe.num_experts, 3)
    assert made["student.visual.patch_embed.proj.weight"].abs().max() > 0  # answers reach the tower without embeds
