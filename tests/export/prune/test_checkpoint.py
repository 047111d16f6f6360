"""Students written out of shards: the same bytes as cut in memory, whole or not there at all, taken by other verbs."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.corpus import PhantomCorpus
from sonoedge.export.inspect import inspect_checkpoint
from sonoedge.export.layerwise import reference_logits
from sonoedge.export.models.config import ModelConfig, MoEConfig, VisionConfig
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import init_model, load_checkpoint, save_checkpoint
from sonoedge.export.models.saving import write_config_files
from sonoedge.export.models.shards import read_headers
from sonoedge.export.preset import alone
from sonoedge.export.prune import verb
from sonoedge.export.prune.card import PrunedStudent
from sonoedge.export.prune.checkpoint import prune_checkpoint
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.prune.sizes import head_choices
from sonoedge.export.recipe import Recipe, load_recipe
from sonoedge.export.safetensors_writer import TensorSpec, write_weights
from sonoedge.export.student import cut_student, with_vocabulary

pytestmark = pytest.mark.usefixtures("one_thread")
Outputs = Callable[..., Tensor]


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Path) -> Recipe:
    return load_recipe(tiny_recipe)


def asking(recipe: Recipe, shape: StudentShape) -> Recipe:
    return msgspec.structs.replace(recipe, student=shape)


def weights_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in {header.file for header in read_headers(folder).values()}:
        found |= load_file(file)
    return found


def write_sharded(model: EchoVLM, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint of several files."""
    folder.mkdir(parents=True)
    state = {key: tensor.detach().to(dtype).contiguous() for key, tensor in model.state_dict().items()}
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    specs = [TensorSpec(key, name, tuple(tensor.shape)) for key, tensor in state.items()]

    def content(spec: TensorSpec) -> Iterator[memoryview]:
        yield state[spec.name].flatten().view(torch.uint8).numpy().data

    assert write_weights(folder, specs, content, largest_bytes=sum(spec.bytes for spec in specs) // 4) > 1
    write_config_files(model.config, folder, dtype, None, {}, {})


def test_pruning_nothing_is_the_identity(teacher: EchoVLM, tmp_path: Path, recipe: Recipe, outputs: Outputs) -> None:
    write_sharded(teacher, tmp_path / "teacher", torch.float32)
    record = prune_checkpoint(tmp_path / "teacher", asking(recipe, StudentShape()), None, tmp_path / "student")
    before, after = weights_of(tmp_path / "teacher"), weights_of(tmp_path / "student")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    student = load_checkpoint(tmp_path / "student")
    assert student.config == teacher.config
    assert torch.equal(outputs(student), outputs(teacher))
    assert record.parameters == record.teacher_parameters == sum(tensor.numel() for tensor in before.values())


def test_dropping_layers_is_the_model_without_them(
    teacher: EchoVLM, tmp_path: Path, recipe: Recipe, outputs: Outputs
) -> None:
    save_checkpoint(teacher, tmp_path / "teacher")
    shape = StudentShape(layers=3, vision_layers=2)
    record = prune_checkpoint(tmp_path / "teacher", asking(recipe, shape), None, tmp_path / "student")
    assert (record.layers, record.vision_layers) == ((0, 2, 3), (0, 2))
    del teacher.model.layers[1], teacher.visual.blocks[1]
    assert torch.equal(outputs(load_checkpoint(tmp_path / "student")), outputs(teacher))


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelConfig, StudentShape]:
    """A tiny model of any shape, and one that it can be cut to."""
    kv_heads, group, experts = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads = kv_heads * group
    hidden = 8 * heads
    config = ModelConfig(
        vocab_size=20,
        hidden_size=hidden,
        intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        mrope_section=(1, 1, 2),
        image_token_id=19,
        video_token_id=18,
        vision_start_token_id=17,
        vision_end_token_id=16,
        vision=VisionConfig(depth=draw(st.integers(1, 3)), embed_dim=8, hidden_size=hidden, num_heads=1, mlp_ratio=1.5),
        moe=MoEConfig(
            num_experts=experts,
            num_experts_per_tok=draw(st.integers(1, experts)),
            moe_intermediate_size=draw(st.integers(1, 6)),
            shared_expert_intermediate_size=draw(st.integers(1, 6)),
        ),
        tie_word_embeddings=draw(st.booleans()),
    )
    assert config.moe is not None
    maybe = {
        "layers": config.num_hidden_layers,
        "vision_layers": config.vision.depth,
        "vision_mlp_size": config.vision.mlp_size,
        "intermediate_size": config.intermediate_size,
        "expert_size": config.moe.moe_intermediate_size,
        "shared_expert_size": config.moe.shared_expert_intermediate_size,
    }
    asked: dict[str, Any] = {key: draw(st.none() | st.integers(1, most)) for key, most in maybe.items()}
    asked["heads"] = draw(st.none() | st.sampled_from(list(head_choices(config))))
    return config, StudentShape(**asked)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=models(), seed=st.integers(0, 99), half=st.booleans())
def test_out_of_shards_as_in_memory(
    recipe: Recipe, outputs: Outputs, model: tuple[ModelConfig, StudentShape], seed: int, half: bool
) -> None:
    config, shape = model
    dtype = torch.bfloat16 if half else torch.float32
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_sharded(init_model(config, seed=seed, std=0.2), folder / "teacher", dtype)
        prune_checkpoint(folder / "teacher", asking(recipe, shape), None, folder / "student")
        in_memory = cut_student(load_checkpoint(folder / "teacher"), shape)
        found = weights_of(folder / "student")
        student = load_checkpoint(folder / "student")
    assert found.keys() == in_memory.state_dict().keys()
    for key, tensor in in_memory.state_dict().items():
        assert torch.equal(found[key], tensor.to(dtype)), key
    assert student.config == in_memory.config
    ids = torch.tensor([[3, 17, *[19] * 4, 16, 5]])
    assert bool(outputs(student, ids).isfinite().all())


@pytest.fixture
def corpus(tiny_checkpoint: Path, frames: PhantomPool) -> PhantomCorpus:
    """Two dozen phantoms."""
    return PhantomCorpus(frames, image_spec(tiny_checkpoint))


TOGETHER = StudentShape(
    vision_layers=1,
    vision_mlp_size=96,
    layers=2,
    intermediate_size=64,
    expert_size=24,
    shared_expert_size=48,
    experts=2,
    expert_method="merge",
    languages=("en",),
    importance="measured",
)


def test_everything_together_is_a_checkpoint_that_other_verbs_take(
    tiny_checkpoint: Path, recipe: Recipe, corpus: PhantomCorpus, tmp_path: Path, sonoedge: Any
) -> None:
    assert load_checkpoint(tiny_checkpoint).config.num_key_value_heads == 2, "so that heads can be cut"
    shape = msgspec.structs.replace(TOGETHER, heads=2)
    for name in ("first", "second"):
        record = prune_checkpoint(tiny_checkpoint, asking(recipe, shape), corpus, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert [
        file for file in files if (tmp_path / "first" / file).read_bytes() != (tmp_path / "second" / file).read_bytes()
    ] == []
    assert {"README.md", "student.json", "token_ids.json", "tokenizer.json", "preprocessor_config.json"} <= {*files}
    found = inspect_checkpoint(tmp_path / "first")
    assert (found.parameters, found.experts, found.layers) == (record.parameters, 2, 2)
    student = load_checkpoint(tmp_path / "first")
    tokenizer = open_tokenizer(tmp_path / "first", student.config)
    assert len(tokenizer) == student.config.vocab_size == record.sizes["vocabulary"] < 512
    token_ids = msgspec.json.decode((tmp_path / "first" / "token_ids.json").read_bytes())
    assert token_ids[tokenizer.image_pad] == load_checkpoint(tiny_checkpoint).config.image_token_id
    assert msgspec.json.decode((tmp_path / "first" / "student.json").read_bytes(), type=PrunedStudent) == record
    assert len(record.influence) == 3
    assert record.tokens > 24
    card = (tmp_path / "first" / "README.md").read_text()
    assert "Pruned, not trained" in card
    assert f"{record.frames} frames" in card
    ran = sonoedge("inspect", tmp_path / "first", "--json")
    assert ran.status == 0, ran.err
    spec = image_spec(tmp_path / "first")
    few = PhantomCorpus(corpus._pool, spec)
    batch = alone(few, tokenizer, spec, 640)[0]
    streamed = reference_logits(tmp_path / "first", [batch])[0]
    with torch.no_grad():
        embeds = student.encode_images(batch.patches, batch.grids)
        packed = batch.packed
        whole = student(packed.input_ids, packed.positions, image_embeds=embeds, attention_bias=packed.attention_bias)
    assert torch.allclose(streamed, whole.logits[0], atol=1e-4)


def test_logits_of_tokens_that_stay_are_equal(
    tiny_checkpoint: Path, recipe: Recipe, tmp_path: Path, outputs: Outputs, farthest: Any
) -> None:
    shape = StudentShape(languages=("zh",))
    prune_checkpoint(tiny_checkpoint, asking(recipe, shape), None, tmp_path / "student")
    teacher, student = load_checkpoint(tiny_checkpoint), load_checkpoint(tmp_path / "student")
    kept = msgspec.json.decode((tmp_path / "student" / "token_ids.json").read_bytes())
    image = student.config.image_token_id
    ids = torch.tensor([[9, 40, *[image] * 4, 77, 3]])
    before = outputs(teacher, torch.tensor(kept)[ids])
    assert farthest(outputs(student, ids), before[:, kept]) < 1e-5
    spoken = with_vocabulary(teacher, student.config, kept)
    assert (spoken.config, spoken.config.vocab_size) == (student.config, len(kept))
    assert farthest(outputs(spoken, ids), before[:, kept]) < 1e-5
    assert spoken.visual.merger.get_parameter("mlp.2.weight") is teacher.visual.merger.get_parameter("mlp.2.weight")


def test_merged_experts_lose_less_than_dropped_ones(
    tiny_checkpoint: Path, recipe: Recipe, corpus: PhantomCorpus, tmp_path: Path
) -> None:
    tokenizer = open_tokenizer(tiny_checkpoint, load_checkpoint(tiny_checkpoint).config)
    batches = alone(corpus, tokenizer, image_spec(tiny_checkpoint), 640)[:6]
    before = reference_logits(tiny_checkpoint, batches)
    lost = {}
    for method in ("drop", "merge"):
        shape = StudentShape(experts=2, expert_method=method, importance="measured")
        prune_checkpoint(tiny_checkpoint, asking(recipe, shape), corpus, tmp_path / method)
        after = reference_logits(tmp_path / method, batches)
        lost[method] = float(np.mean([float((a - b).square().mean()) for a, b in zip(after, before, strict=True)]))
    print(lost)
    assert 0 < lost["merge"] < 0.9 * lost["drop"]


def test_a_target_of_parameters_is_met(tiny_checkpoint: Path, recipe: Recipe, tmp_path: Path) -> None:
    whole = inspect_checkpoint(tiny_checkpoint).parameters
    shape = StudentShape(parameters=whole * 3 // 4)
    prune_checkpoint(tiny_checkpoint, asking(recipe, shape), None, tmp_path / "student")
    assert 0.6 * whole < inspect_checkpoint(tmp_path / "student").parameters <= 0.75 * whole


def test_a_target_for_a_device_is_met(tiny_checkpoint: Path, recipe: Recipe, tmp_path: Path, sonoedge: Any) -> None:
    shape = StudentShape(profile="jetson-orin-nano-4gb", latency_ms=1000.0)
    record = prune_checkpoint(tiny_checkpoint, asking(recipe, shape), None, tmp_path / "student")
    assert record.sizes == record.teacher_sizes, "which fits as it is"


def test_the_verb_tells_what_it_did(
    tiny_checkpoint: Path, write_recipe: Any, tmp_path: Path, sonoedge: Any, frames: PhantomPool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(verb, "phantom_pool", lambda *_, **__: frames)
    path = write_recipe(tmp_path / "r.toml", student={"importance": "measured"})
    ran = sonoedge("prune", tiny_checkpoint, "--recipe", path, "--data", "phantoms", "--out", tmp_path / "a", "--json")
    assert ran.status == 0, ran.err
    told = msgspec.json.decode(ran.last_line, type=verb.Pruned)
    assert told.student.parameters == inspect_checkpoint(tmp_path / "a").parameters < told.student.teacher_parameters
    assert (told.student.importance, told.student.frames) == ("measured", 12)
    path = write_recipe(tmp_path / "r.toml")
    ran = sonoedge("prune", tiny_checkpoint, "--recipe", path, "--out", tmp_path / "b")
    assert ran.status == 0, ran.err
    assert "of its teacher's, chosen by weights alone; not trained" in ran.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "r.toml"]


@pytest.mark.parametrize(
    ("student", "data", "words"),
    [
        ({"layers": 9}, None, "student.layers = 9 exceeds the teacher's 3"),
        ({}, "phantoms", "importance = 'weights', which measures nothing"),
        ({"importance": "measured"}, None, "importance = 'measured' and there is no data: give --data"),
        ({"languages": ["en"], "vocabulary": 99}, None, "student.vocabulary = 99"),
        ({"profile": "jetson-orin-nano-4gb", "memory_bytes": 5}, None, "the smallest reachable serves in"),
        ({"profile": "unheard-of"}, None, "unheard-of"),
        (None, None, "the recipe has no [student]"),
    ],
)
def test_refusals_leave_nothing(
    tiny_checkpoint: Path, write_recipe: Any, tmp_path: Path, sonoedge: Any, rendered: None, student: Any, data: Any,
    words: str,
) -> None:  # fmt: skip
    path = write_recipe(tmp_path / "r.toml", student=student)
    given_data = () if data is None else ("--data", data)
    ran = sonoedge("prune", tiny_checkpoint, "--recipe", path, *given_data, "--out", tmp_path / "new" / "out")
    assert ran.status == 2
    assert words in ran.err
    assert ran.err.count("\n") < 4
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "new") == ["r.toml"]
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


@pytest.fixture
def rendered(frames: PhantomPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Phantoms that lie there already."""
    monkeypatch.setattr(verb, "phantom_pool", lambda *_, **__: frames)


def test_a_folder_in_use_and_a_missing_tokenizer_are_refused(
    tiny_checkpoint: Path, tiny_recipe: Path, save_variant: Callable[..., Path], tmp_path: Path, sonoedge: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    ran = sonoedge("prune", tiny_checkpoint, "--recipe", tiny_recipe, "--out", tmp_path / "out")
    assert (ran.status, "out exists and is not an empty folder" in ran.err) == (2, True)
    ran = sonoedge("prune", save_variant(), "--recipe", tiny_recipe, "--out", tmp_path / "other")
    assert (ran.status, "tokenizer.json does not exist" in ran.err) == (2, True)


def test_what_takes_the_folder_says_so_in_memory(teacher: EchoVLM) -> None:
    for shape in (StudentShape(languages=("en",)), StudentShape(importance="measured")):
        with pytest.raises(SonoEdgeError, match="takes the teacher's folder: use `sonoedge prune`"):
            cut_student(teacher, shape)


def test_killed_in_the_middle_it_leaves_nothing_at_out(
    tiny_checkpoint: Path, tiny_recipe: Path, tmp_path: Path, sonoedge: Any
) -> None:
    """Killed when the weights are written, and run again."""
    killing = (
        "import os, signal, sys; from sonoedge.cli import main; from sonoedge.export.prune import checkpoint; "
        "checkpoint.write_student_files = lambda *_: os.kill(os.getpid(), signal.SIGKILL); sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    arguments = ["prune", str(tiny_checkpoint), "--recipe", str(tiny_recipe), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", killing, *arguments], check=False, timeout=120, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert any(tmp_path.glob(".out.*/*.safetensors"))
    assert sonoedge(*arguments).status == 0
    assert inspect_checkpoint(out).layers == 2
