"""`sonoedge distill`: the student learns, from phantoms and from conversations; errors leave nothing behind."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export import distill
from sonoedge.export.checkpoint_files import open_tokenizer
from sonoedge.export.corpus import Batch, Batches, PhantomCorpus
from sonoedge.export.distill import distil
from sonoedge.export.distilling.curves import read_log
from sonoedge.export.distilling.lesson import LOAD, Lesson, counted, even_load, wanted_outputs
from sonoedge.export.distilling.taught import ask
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.recipe import Distillation, load_recipe
from sonoedge.export.student import cut_student
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
SPEC = ImageSpec(max_pixels=84 * 84)


def mean_losses(
    student: EchoVLM, teacher: EchoVLM, batch: Batch, settings: Distillation, *, vision_only: bool = False
) -> dict[str, float]:
    """Every loss of one batch that has a weight."""
    taught = ask(teacher, batch, wanted_outputs(student.config, teacher.config, settings), vision_only=vision_only)
    with torch.no_grad():
        found = Lesson(student, teacher.config, settings)(batch, taught, even_load(student.config), vision_only)
    counts = counted(batch)
    return {name: float(loss) / counts.of(name) for name, loss in found.items() if name != LOAD}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def rendered(frames: PhantomPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phantoms that lie there already, so that only training takes time."""
    monkeypatch.setattr(distill, "phantom_pool", lambda *_, **__: frames)


@pytest.mark.parametrize(("weights", "learnt"), [((1.0, 0.0), "answers"), ((0.0, 1.0), "logits")])
def test_losses_go_down(
    tiny_model: EchoVLM,
    tiny_tokenizer: Tokenizer,
    frames: PhantomPool,
    tiny_recipe: Path,
    weights: tuple[float, float],
    learnt: str,
) -> None:
    """Each by itself: what a random teacher says contradicts the answers."""
    recipe = load_recipe(tiny_recipe)
    shape, settings = distill.sections(recipe)
    answer_weight, logits_weight = weights
    changed = msgspec.structs.replace(settings, answer_weight=answer_weight, logits_weight=logits_weight)
    recipe = msgspec.structs.replace(recipe, distill=changed)
    corpus = PhantomCorpus(frames, SPEC)
    held_out = Batches(corpus, tiny_tokenizer, SPEC, size=8, seed=99, context=recipe.limits.context).batch(0)

    def losses(student: EchoVLM) -> dict[str, float]:
        return mean_losses(student, tiny_model, held_out, settings)

    before = losses(cut_student(tiny_model, shape))
    after = losses(distil(tiny_model, tiny_tokenizer, corpus, SPEC, recipe))
    print(before, after)
    assert set(before) >= {"answers", "logits", "embeds", "balance"}
    for name in (learnt, "embeds"):
        assert after[name] < 0.9 * before[name], name


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(
    tiny_model: EchoVLM, tiny_tokenizer: Tokenizer, frames: PhantomPool, tiny_recipe: Path
) -> None:
    _, settings = distill.sections(load_recipe(tiny_recipe))
    batch = Batches(PhantomCorpus(frames, SPEC), tiny_tokenizer, SPEC, size=4, seed=1, context=640).batch(0)
    matched = msgspec.structs.replace(settings, hidden_weight=1.0, router_weight=1.0)
    found = mean_losses(tiny_model, tiny_model, batch, matched)
    seen = mean_losses(tiny_model, tiny_model, batch, settings, vision_only=True)
    for name in ("logits", "router"):
        assert abs(found[name]) < 1e-5
    assert found["embeds"] == 0
    assert found["hidden"] < 1e-10
    assert set(seen) == {"embeds"}


def test_the_verb_writes_the_same_student_twice(
    tiny_checkpoint: Path, tiny_recipe: Path, rendered: None, tmp_path: Path, sonoedge: Any
) -> None:
    for name in ("first", "second"):
        ran = sonoedge(
            "distill",
            tiny_checkpoint,
            "--recipe",
            tiny_recipe,
            "--data",
            "phantoms",
            "--out",
            tmp_path / name,
            "--json",
        )
        assert ran.status == 0, ran.err
    report = msgspec.json.decode(ran.last_line)
    student = load_checkpoint(tmp_path / "first")
    assert report["student_parameters"] == sum(p.numel() for p in student.parameters())
    assert report["student_parameters"] < report["teacher_parameters"]
    assert student.config.num_hidden_layers == 2
    assert student.config.eos_token_ids == load_checkpoint(tiny_checkpoint).config.eos_token_ids
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    image = msgspec.json.decode((tmp_path / "first" / "preprocessor_config.json").read_bytes())
    assert image["max_pixels"] == 84 * 84
    assert left_in(tmp_path) == ["first", "first.training", "second", "second.training"]
    assert left_in(tmp_path / "first.training") == ["curves.html", "log.jsonl"]
    logs = [(tmp_path / f"{name}.training" / "log.jsonl").read_bytes() for name in ("first", "second")]
    assert logs[0] == logs[1]
    steps = read_log(tmp_path / "first.training" / "log.jsonl")
    assert [step.step for step in steps] == list(range(24))
    assert [set(step.losses) for step in (steps[7], steps[8])] == [
        {"embeds"},
        {"embeds", "answers", "logits", "balance"},
    ]
    page = (tmp_path / "first.training" / "curves.html").read_text()
    assert page.count("<svg") == 5  # the total beside them
    assert "http" not in page.replace("http-equiv", "")


def test_a_recipe_may_trim_the_vocabulary_and_measure_what_stays(
    tiny_checkpoint: Path, tiny_recipe: Path, rendered: None, tmp_path: Path, sonoedge: Any
) -> None:
    recipe = tmp_path / "recipe.toml"
    asked = '[student]\nlanguages = ["en"]\nimportance = "measured"\n'
    recipe.write_text(tiny_recipe.read_text().replace("[student]\n", asked))
    out = tmp_path / "student"
    ran = sonoedge("distill", tiny_checkpoint, "--recipe", recipe, "--data", "phantoms", "--out", out, "--json")
    assert ran.status == 0, ran.err
    teacher, student = load_checkpoint(tiny_checkpoint), load_checkpoint(out)
    assert student.config.vocab_size < teacher.config.vocab_size
    assert student.config.num_hidden_layers < teacher.config.num_hidden_layers
    words = "Is a lesion visible?"
    assert open_tokenizer(out, student.config).decode(open_tokenizer(out, student.config).encode(words)) == words
    assert left_in(tmp_path / "student.training") == ["curves.html", "log.jsonl"]
    steps = read_log(tmp_path / "student.training" / "log.jsonl")
    assert "logits" in steps[-1].losses  # of the same tokens as the teacher's
    bundled = sonoedge("inspect", out, "--json")
    assert bundled.status == 0


def test_the_verb_renders_what_the_recipe_asks(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], tmp_path: Path, sonoedge: Any
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", distill={"frames": 5, "steps": 2, "vision_steps": 1, "batch": 2})
    ran = sonoedge("distill", tiny_checkpoint, "--recipe", recipe, "--data", "phantoms", "--out", tmp_path / "out")
    assert ran.status == 0, ran.err
    assert "of its teacher's" in ran.out
    assert load_checkpoint(tmp_path / "out").config.vision.depth == 1


def cases(folder: Path, *, answer: str = "liver") -> Path:
    """Conversations about pictures of two sizes, and about two pictures at once."""
    entries = []
    for number, sizes in enumerate([[(60, 90)], [(120, 60)], [(60, 90), (120, 60)]]):
        names: list[str] = []
        for height, width in sizes:
            names.append(f"{number}_{len(names)}.png")
            picture = np.random.default_rng(number).integers(0, 255, (height, width, 3), np.uint8)
            cv2.imwrite(str(folder / names[-1]), picture)
        turns = [
            {"from": "human", "value": "<image>" * len(names) + "这是哪个部位？"},
            {"from": "gpt", "value": answer},
        ]
        entries.append({"id": number, "image": names, "conversations": turns})
    (folder / "cases.json").write_bytes(msgspec.json.encode(entries))
    return folder / "cases.json"


def test_conversations_with_images_of_any_size_and_number(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], tmp_path: Path, sonoedge: Any
) -> None:
    recipe = write_recipe(tmp_path / "r.toml", distill={"steps": 8, "vision_steps": 2, "batch": 3})
    ran = sonoedge(
        "distill", tiny_checkpoint, "--recipe", recipe, "--data", cases(tmp_path), "--out", tmp_path / "out", "--json"
    )
    assert ran.status == 0, ran.err
    cut = cut_student(load_checkpoint(tiny_checkpoint), distill.sections(load_recipe(recipe))[0])
    trained = load_checkpoint(tmp_path / "out")
    assert trained.config == cut.config
    moved = {
        name: float((tensor - cut.state_dict()[name]).abs().max()) for name, tensor in trained.state_dict().items()
    }
    assert all(change > 0 for name, change in moved.items() if "experts" not in name), moved


def test_an_existing_folder_is_refused_at_once(
    tiny_checkpoint: Path, tiny_recipe: Path, tmp_path: Path, sonoedge: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    ran = sonoedge("distill", tiny_checkpoint, "--recipe", tiny_recipe, "--data", "phantoms", "--out", tmp_path / "out")
    assert ran.status == 2
    assert "out exists and is not an empty folder" in ran.err
    assert "render" not in ran.err
    assert left_in(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"])
def test_a_checkpoint_without_a_file_is_refused_at_once(
    tiny_checkpoint: Path, tiny_recipe: Path, tmp_path: Path, sonoedge: Any, missing: str
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "teacher")
    (tmp_path / "teacher" / missing).unlink()
    ran = sonoedge(
        "distill", tmp_path / "teacher", "--recipe", tiny_recipe, "--data", "phantoms", "--out", tmp_path / "out"
    )
    assert ran.status == 2
    assert missing in ran.err
    assert "render" not in ran.err
    assert left_in(tmp_path) == ["teacher"]


LATE: dict[str, tuple[dict[str, dict[str, Any]], str]] = {
    "a student larger than its teacher": ({"student": {"layers": 9}}, "student.layers = 9 exceeds the teacher's 3"),
    "a loss that explodes": ({"distill": {"learning_rate": 1e30, "warmup_steps": 0}}, "lower distill.learning_rate"),
    "a sample over the context": ({"limits": {"context": 50}}, "limits.context = 50"),
}


@pytest.mark.parametrize(("sections", "words"), LATE.values(), ids=LATE)
def test_what_goes_wrong_in_training_leaves_nothing_behind(
    tiny_checkpoint: Path, write_recipe: Callable[..., Path], rendered: None, tmp_path: Path, sonoedge: Any,
    sections: dict[str, dict[str, Any]], words: str,
) -> None:  # fmt: skip
    recipe = write_recipe(tmp_path / "r.toml", **sections)
    ran = sonoedge(
        "distill", tiny_checkpoint, "--recipe", recipe, "--data", "phantoms", "--out", tmp_path / "new" / "out"
    )
    assert ran.status == 2, ran.err
    assert words in ran.err
    assert not (tmp_path / "new" / "out").exists()
    kept = tmp_path / "new" / "out.training"
    assert not kept.exists() or set(left_in(kept)) <= {"log.jsonl", "run.json"}


def test_a_dense_checkpoint_is_refused(
    save_variant: Callable[..., Path], tiny_tokenizer: Tokenizer, frames: PhantomPool, tiny_recipe: Path
) -> None:
    dense = load_checkpoint(save_variant(moe=None))
    with pytest.raises(SonoEdgeError, match="which has no experts"):
        distil(dense, tiny_tokenizer, PhantomCorpus(frames, SPEC), SPEC, load_recipe(tiny_recipe))
