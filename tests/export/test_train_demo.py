"""Training of the demo teacher: a killed run goes on to the same losses and weights; `main` leaves a checkpoint."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export import train_demo
from sonoedge.export.evaluate import open_model
from sonoedge.export.packing import Packer
from sonoedge.export.teacher_recipe import Phase, TeacherRecipe, TeacherShape, load_teacher_recipe
from sonoedge.export.train_demo import Trainer, draw, dropped_layers, learning_rate
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ImageSpec(max_pixels=84 * 84)


@pytest.fixture
def recipe() -> TeacherRecipe:
    """The packaged recipe at the smallest sizes."""
    packaged = load_teacher_recipe(train_demo.RECIPE)
    shape = TeacherShape(
        hidden_size=64,
        layers=3,
        heads=4,
        kv_heads=2,
        intermediate_size=80,
        experts=4,
        experts_per_token=2,
        expert_size=24,
        shared_expert_size=32,
        vision_width=64,
        vision_depth=3,
        vision_heads=4,
        context=640,
        image_pixels=84 * 84,
    )
    phase = Phase(
        steps=6, batch=3, learning_rate=2e-3, warmup_steps=2, layer_drop=0.5, dense_weight=0.5, balance_weight=0.01
    )
    return msgspec.structs.replace(packaged, frames=24, vocabulary=512, model=shape, vision=phase, joint=phase)


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture
def trained(
    recipe: TeacherRecipe,
    frames: PhantomPool,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., tuple[Trainer, list[dict[str, float]]]]:
    """Train one phase in a folder, killed before the step `until`; gives the trainer and the losses of its steps."""
    monkeypatch.setattr(train_demo, "SAVE_EVERY_STEPS", 2)

    def train(name: str, phase: str, *, until: int | None = None) -> tuple[Trainer, list[dict[str, float]]]:
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        trainer = Trainer(recipe, work, tiny_tokenizer, SPEC)
        trainer.restore()
        seen: list[dict[str, float]] = []
        losses = trainer.losses

        def recorded(*arguments: Any) -> dict[str, tuple[float, Tensor]]:
            if until is not None and trainer.done_steps[phase] == until:
                raise Killed
            found = losses(*arguments)
            seen.append({key: float(value.detach()) for key, (_, value) in found.items()})
            return found

        trainer.losses = recorded  # type: ignore[method-assign, assignment]
        packer = Packer(tiny_tokenizer, [(1, 6, 6)], SPEC) if phase == "joint" else None
        try:
            trainer.run(phase, getattr(recipe, phase), frames, packer)
        except Killed:
            assert until is not None
        return trainer, seen

    return train


@pytest.mark.parametrize("phase", ["vision", "joint"])
def test_a_killed_run_goes_on_to_the_same_losses(
    trained: Callable[..., tuple[Trainer, list[dict[str, float]]]], phase: str
) -> None:
    whole, wanted = trained("whole", phase)
    assert len(wanted) == 6
    assert set(wanted[0]) == ({"dense"} if phase == "vision" else {"answers", "dense", "balance"})
    trained("killed", phase, until=3)  # step 2 is lost: the state was saved after two steps
    resumed, losses = trained("killed", phase)
    assert losses == wanted[2:]
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
    again, none = trained("killed", phase)
    assert none == []
    assert again.done_steps[phase] == 6
    assert again.seconds == pytest.approx(resumed.seconds)


def test_a_state_half_written_does_no_harm(
    trained: Callable[..., tuple[Trainer, list[dict[str, float]]]], tmp_path: Path
) -> None:
    trained("killed", "vision", until=3)
    (tmp_path / "killed" / "state.tmp").write_bytes(b"half")
    trainer, losses = trained("killed", "vision")
    assert len(losses) == 4
    assert trainer.done_steps["vision"] == 6


def test_layers_are_dropped_for_a_step_only(recipe: TeacherRecipe, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Trainer(recipe, tmp_path, tiny_tokenizer, SPEC).model
    vision, decoder = list(model.visual.blocks), list(model.model.layers)
    depths = set()
    for seed in range(12):
        with dropped_layers(model, 0.5, np.random.default_rng(seed)):
            assert model.visual.blocks[0] is vision[0]
            assert model.visual.blocks[-1] is vision[-1]
            assert model.model.layers[-1] is decoder[-1]
            depths.add((len(model.visual.blocks), len(model.model.layers)))
    assert depths == {(2, 2), (2, 3), (3, 2), (3, 3)}
    assert list(model.visual.blocks) == vision
    assert list(model.model.layers) == decoder


def test_learning_rate_rises_and_falls() -> None:
    phase = Phase(steps=100, batch=1, learning_rate=2.0, warmup_steps=10, layer_drop=0.0)
    rates = [learning_rate(phase, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.04, abs=0.01)


def test_half_of_the_drawn_frames_are_mirrored(frames: PhantomPool) -> None:
    drawn = draw(frames, 400, np.random.default_rng(0))
    mirrored = 0
    for frame in drawn:
        plain = frames[frame.truth.seed - 100]
        mirrored += not np.array_equal(frame.grey, plain.grey)
    assert 150 < mirrored < 250


def test_main_leaves_a_checkpoint_with_its_card(
    recipe: TeacherRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = msgspec.structs.replace(recipe.vision, steps=2)
    recipe = msgspec.structs.replace(recipe, frames=8, vision=quick, joint=quick)
    monkeypatch.setattr(train_demo, "EVALUATION_FRAMES", 3)
    monkeypatch.setattr(train_demo, "load_teacher_recipe", lambda _path: recipe)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("of an earlier run")
    monkeypatch.setattr(sys, "argv", ["train_demo", "--work", str(tmp_path / "work"), "--out", str(out)])
    train_demo.main()
    assert "3 fresh phantoms" in capsys.readouterr().out
    assert "It has never seen a patient" in (out / "README.md").read_text()
    session, tokenizer = open_model(out)
    assert session.image == SPEC
    assert session.spec.vocab == len(tokenizer) == 512
    assert not (out / "old").exists()
    numbers = msgspec.json.decode((out / "evaluation.json").read_bytes())
    assert numbers["frames"] == 3
    assert numbers["recipe"]["seed"] == recipe.seed


def test_a_wrong_teacher_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "teacher.toml"
    path.write_text(train_demo.RECIPE.read_text().replace("heads = 5\n", "heads = 0\n", 1))
    with pytest.raises(SonoEdgeError, match=r"teacher.toml is wrong: model.heads = 0: Expected `int` >= 1"):
        load_teacher_recipe(path)
