"""Which sizes a student can have: explicit ones, ones picked for a target, and what each refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.device_profiles import load_profile
from sonoedge.device_profiles.memory_plan import Use
from sonoedge.device_profiles.planning import Model, choose_mode, make_plan
from sonoedge.device_profiles.shape import weigh
from sonoedge.errors import SonoEdgeError
from sonoedge.export.make_checkpoint import named_config
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.loading import empty_model
from sonoedge.export.plan_source import shape_of
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.prune.sizes import head_choices, shape_sizes, student_config
from sonoedge.export.prune.target import fill, over_device, over_parameters
from sonoedge.export.recipe import load_recipe

USE = Use(
    context=1024,
    image_tokens=196,
    int8_products=True,
    prefix_tokens=230,
    question_tokens=20,
    hint_tokens=120,
    hint_rows=10,
)


@pytest.fixture(scope="module")
def released() -> ModelConfig:
    """The sizes of the released EchoVLM."""
    return named_config("echovlm-7b")


def test_nothing_named_is_the_teacher(released: ModelConfig) -> None:
    assert student_config(released, StudentShape()) == released


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (StudentShape(layers=29), "student.layers = 29 exceeds the teacher's 28: choose at most that"),
        (StudentShape(vision_layers=33), "student.vision_layers = 33 exceeds the teacher's 32"),
        (StudentShape(experts=5, importance="measured"), "student.experts = 5 exceeds the teacher's 4"),
        (StudentShape(kv_heads=5), "student.kv_heads = 5 exceeds the teacher's 4"),
        (StudentShape(hidden_size=4096), "student.hidden_size = 4096 exceeds the teacher's 3584"),
        (StudentShape(hidden_size=1000), r"sections \[16, 24, 24\] fix: choose 896 or 1024"),
        (StudentShape(hidden_size=100), "choose 128"),
        (StudentShape(hidden_size=1024, heads=7), "make 896: name one of the two keys"),
        (StudentShape(heads=13), "heads = 13 does not divide into at most 4 KV groups of at most 7 heads"),
        (StudentShape(heads=16, kv_heads=3), "kv_heads = 3 does not divide 16 heads into groups of at most 7"),
        (StudentShape(heads=16, kv_heads=2), "groups of at most 7, as the teacher has them: choose 4"),
        (StudentShape(heads=13, kv_heads=2), "choose student.heads among 1, 2, 3"),
    ],
)
def test_sizes_that_cannot_be(released: ModelConfig, shape: StudentShape, words: str) -> None:
    with pytest.raises(SonoEdgeError, match=words):
        student_config(released, shape)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"parameters": 5, "profile": "cpu-x86-64"}, "give one of the keys `parameters` and `profile`"),
        ({"latency_ms": 5}, "name it with the key `profile`"),
        ({"vocabulary": 900}, "name them with the key `languages`"),
        ({"languages": ["fr"]}, "languages"),
        ({"experts": 2}, 'set importance = "measured"'),
        ({"expert_method": "merge"}, "needs the key `experts`"),
        ({"hidden_sizes": 3}, "unknown field `hidden_sizes`"),
    ],
)
def test_sections_that_contradict_themselves(
    write_recipe: Any, tmp_path: Path, section: dict[str, Any], words: str
) -> None:
    path = write_recipe(tmp_path / "r.toml", student=section)
    with pytest.raises(SonoEdgeError, match=f"(?s)r.toml is wrong: .*{words}"):
        load_recipe(path)


def test_every_choice_of_heads_keeps_the_teachers_groups(released: ModelConfig) -> None:
    choices = head_choices(released)
    assert choices[28] == choices[24] == choices[4] == 4
    assert (choices[14], choices[7], choices[1], choices[21]) == (2, 1, 1, 3)
    assert 13 not in choices
    for heads, kv_heads in choices.items():
        student_config(released, StudentShape(heads=heads, kv_heads=kv_heads)).check()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("student-2.5b", 2.5e9), ("student-1b", 1.0e9), ("student-500m", 0.5e9)],
)
def test_packaged_students_are_as_large_as_they_are_called(released: ModelConfig, name: str, parameters: float) -> None:
    shape = load_recipe(name).student
    assert shape is not None
    assert shape.vocabulary is not None
    student = student_config(msgspec.structs.replace(released, vocab_size=shape.vocabulary), shape)
    student.check()
    found = sum(tensor.numel() for tensor in empty_model(student).state_dict().values())
    assert found == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize("parameters", [8_000_000_000, 2_500_000_000, 1_500_000_000])
def test_a_student_of_so_many_parameters(released: ModelConfig, parameters: int) -> None:
    student = student_config(released, fill(released, StudentShape(parameters=parameters), over_parameters(parameters)))
    student.check()
    found = sum(tensor.numel() for tensor in empty_model(student).state_dict().values())
    assert 0.97 * parameters < found <= parameters
    whole, sizes = shape_sizes(released), shape_sizes(student)
    shares = [sizes[key] / whole[key] for key in whole if key not in ("experts", "kv_heads")]
    assert max(shares) < 1.6 * min(shares), "all sizes are cut by about one factor"


def test_named_sizes_stay_as_they_are_named(released: ModelConfig) -> None:
    asked = StudentShape(parameters=2_000_000_000, layers=28, heads=8, kv_heads=2)
    sizes = shape_sizes(student_config(released, fill(released, asked, over_parameters(2_000_000_000))))
    assert (sizes["layers"], sizes["heads"], sizes["kv_heads"]) == (28, 8, 2)


def test_a_target_that_no_pruning_reaches_says_the_smallest(released: ModelConfig) -> None:
    with pytest.raises(
        SonoEdgeError, match=r"parameters = 1000 and the smallest reachable has \d+: ask for more"
    ) as told:
        fill(released, StudentShape(parameters=1000), over_parameters(1000))
    smallest = int(str(told.value).split(" has ")[1].split(":")[0])
    fill(released, StudentShape(), over_parameters(smallest))
    with pytest.raises(SonoEdgeError, match="smallest reachable"):
        fill(released, StudentShape(), over_parameters(smallest - 1))
    with pytest.raises(SonoEdgeError, match="name fewer sizes in"):
        fill(released, StudentShape(hidden_size=3584), over_parameters(smallest))


@pytest.mark.parametrize(
    ("memory_bytes", "latency_ms"), [(None, None), (2_000_000_000, None), (None, 300.0)], ids=["fits", "memory", "ms"]
)
def test_a_student_for_a_device(released: ModelConfig, memory_bytes: int | None, latency_ms: float | None) -> None:
    profile = load_profile("jetson-orin-nano-8gb")
    mode = choose_mode(profile, None)
    config = student_config(
        released, fill(released, StudentShape(), over_device(profile, mode, USE, memory_bytes, latency_ms))
    )
    shape = shape_of(config)
    plan = make_plan(Model("student", shape, weigh(shape), USE), profile, mode)
    assert plan.fits
    if memory_bytes is not None:
        assert 0.9 * memory_bytes < plan.memory.serving_bytes <= memory_bytes
    if latency_ms is not None:
        assert plan.frame_to_hints is not None
        assert plan.frame_to_hints.expected_ms is not None
        assert 0.8 * latency_ms < plan.frame_to_hints.expected_ms <= latency_ms


def test_a_device_that_no_student_fits(released: ModelConfig) -> None:
    profile = load_profile("jetson-orin-nano-8gb")
    mode = choose_mode(profile, None)
    with pytest.raises(SonoEdgeError, match=r"latency_ms = 0.001 and the smallest reachable takes .* ms: ask for more"):
        fill(released, StudentShape(), over_device(profile, mode, USE, None, 0.001))
    with pytest.raises(SonoEdgeError, match=r"memory_bytes = 1000 and the smallest reachable serves in \d+"):
        fill(released, StudentShape(), over_device(profile, mode, USE, 1000, None))


def test_a_device_whose_memory_nobody_knows(released: ModelConfig) -> None:
    profile = load_profile("cpu-x86-64")
    with pytest.raises(SonoEdgeError, match=r"does not know its memory: add student\.memory_bytes"):
        fill(released, StudentShape(), over_device(profile, choose_mode(profile, None), USE, None, None))
