"""Recipes: what is wrong is told with file, key and value; the hash follows what is meant, not how it is written."""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.recipe import DEFAULT, Quantization, load_recipe
from sonoedge.export.scheme import CacheScheme, Scheme
from sonoedge.export.teacher_recipe import load_teacher_recipe
from sonoedge.runtime.tokens import Tokenizer


@pytest.fixture
def changed(tmp_path: Path, tiny_recipe: Path) -> Path:
    """A copy of the recipe, to be spoilt."""
    path = tmp_path / "changed.toml"
    path.write_text(tiny_recipe.read_text())
    return path


def spoil(path: Path, pattern: str, line: str) -> None:
    """Replace the one line that `pattern` begins."""
    text, count = re.subn(rf"(?m)^{pattern}.*$", line, path.read_text())
    assert count == 1
    path.write_text(text)


def test_packaged_recipe_by_name_by_path_and_by_default() -> None:
    assert load_recipe("demo") == load_recipe() == load_recipe(DEFAULT) == load_recipe(str(DEFAULT))


def test_packaged_teacher_recipe_is_right(tiny_tokenizer: Tokenizer) -> None:
    recipe = load_teacher_recipe(DEFAULT.parent / "demo-teacher.toml")
    config = recipe.model_config(recipe.vocabulary, tiny_tokenizer)
    assert config.hidden_size == recipe.model.hidden_size
    assert 2 * sum(config.mrope_section) == config.head_dim
    assert config.image_token_id == tiny_tokenizer.image_pad


@pytest.mark.parametrize(
    ("pattern", "line", "words"),
    [
        (r"steps =", "steps = 0", "distill.steps = 0: Expected `int` >= 1"),
        (r"learning_rate =", 'learning_rate = "fast"', "distill.learning_rate = 'fast': Expected `float`"),
        (r"known_share =", "known_share = 1.5", "hints.known_share = 1.5: Expected `float` <= 1"),
        (r"default =", 'default = "w4a16"', "quantization.default = 'w4a16': Invalid enum value"),
        (r"context =", "contxt = 512", "limits: Object contains unknown field `contxt`"),
        (r"golden_cases =", "", "limits: Object missing required field `golden_cases`"),
        (r"graphs =", 'graphs = "both"', "quantization.graphs = 'both': Invalid enum value"),
        (r"default =", 'default = "w8a8"\ncache = "int4"', "quantization.cache = 'int4': Invalid enum value"),
        (r"default =", 'default = "w8a8"\nfloat = ["visual"]', "quantization: Object contains unknown field `float`"),
        (
            r"\[quantization\.schemes\]",
            '[quantization.schemes]\nvisual = "int8"',
            "quantization.schemes[...]: Invalid enum value 'int8'",
        ),
        (
            r"least_expert_tokens =",
            'least_expert_tokens = 1\nobserver = "max"',
            "calibration.observer = 'max': Invalid",
        ),
        (
            r"least_expert_tokens =",
            "least_expert_tokens = -1",
            "calibration.least_expert_tokens = -1: Expected `int` >= 0",
        ),
        (r"least_expert_tokens =", "least_expert_tokens = 1\npercentile = 40", "calibration.percentile = 40: Expected"),
        (r"\[limits\]", "[search]\nframes = 0\n[limits]", "search.frames = 0: Expected `int` >= 1"),
        (
            r"\[limits\]",
            "[fidelity]\nfirst_frame_seed = 1\nframes = 1\nleast_top1 = 2\n[limits]",
            "fidelity.least_top1 = 2",
        ),
        (r"\[limits\]", "[qat]\nsteps = 3\n[limits]", "qat: Object missing required field `seed`"),
        (r"version =", "version = 2", "version = 2: this SonoEdge reads version 1"),
        (r"version =", "version = 1\nextra = 1", "contains unknown field `extra`"),
        (r"version =", "version == 1", "is not TOML"),
    ],
)
def test_a_wrong_recipe_names_file_key_and_value(changed: Path, pattern: str, line: str, words: str) -> None:
    spoil(changed, pattern, line)
    with pytest.raises(SonoEdgeError) as refusal:
        load_recipe(changed)
    assert str(changed) in str(refusal.value)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_bytes_that_are_no_text_are_refused(changed: Path) -> None:
    changed.write_bytes(b"version = \xff\xfe")
    with pytest.raises(SonoEdgeError, match=r"changed.toml is not TOML"):
        load_recipe(changed)


def test_unknown_names_and_missing_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"unknown recipe 'fast': choose demo"):
        load_recipe("fast")
    with pytest.raises(SonoEdgeError, match=r"none.toml cannot be read \(No such file"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(SonoEdgeError, match=r"cannot be read \(Is a directory"):
        load_recipe(f"{tmp_path}/")


def test_hash_passes_over_comments_and_order(changed: Path) -> None:
    before = load_recipe(changed).sha256
    version, *sections = changed.read_text().split("\n[")
    without = [section for section in sections if not section.startswith("calibration]")]
    changed.write_text("\n[".join([f"# a remark\n{version}", *(f"{section}\n" for section in without)]))
    with pytest.raises(SonoEdgeError, match="missing required field `calibration`"):
        load_recipe(changed)
    changed.write_text("\n[".join([f"# a remark\n{version}", *(f"{section}\n" for section in reversed(sections))]))
    assert load_recipe(changed).sha256 == before
    spoil(changed, "warmup_steps =", "warmup_steps = 3")
    assert load_recipe(changed).sha256 != before


def test_sections_that_are_not_done_are_left_out(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path / "r.toml", student=None, distill=None, hints=None))
    assert (recipe.student, recipe.distill, recipe.hints) == (None, None, None)
    assert (recipe.search, recipe.qat, recipe.fidelity) == (None, None, None)


def test_the_longest_beginning_of_a_name_decides() -> None:
    schemes = {
        "visual.merger": Scheme.FLOAT,
        "lm_head": Scheme.W8A16,
        "model.layers": Scheme.W8A8_DYNAMIC,
        "model.layers.1": Scheme.W8A16_BLOCK,
        "model.layers.1.moe.experts": Scheme.FLOAT,
    }
    for given in (schemes, dict(reversed(schemes.items()))):
        settings = Quantization(Scheme.W8A8, schemes=given)
        assert settings.scheme("visual.merger.mlp.0") is Scheme.FLOAT
        assert settings.scheme("lm_head") is Scheme.W8A16
        assert settings.scheme("visual.blocks.0.mlp.fc1") is Scheme.W8A8
        assert settings.scheme("model.layers.0.mlp.up_proj") is Scheme.W8A8_DYNAMIC
        assert settings.scheme("model.layers.1.mlp.up_proj") is Scheme.W8A16_BLOCK
        assert settings.scheme("model.layers.1.moe.experts") is Scheme.FLOAT
    assert Quantization(Scheme.FLOAT).scheme("lm_head") is Scheme.FLOAT
    assert msgspec.structs.asdict(Quantization(Scheme.W8A8)) == {
        "default": Scheme.W8A8, "graphs": "speed", "cache": CacheScheme.FLOAT, "schemes": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in DEFAULT.parent.glob("*.toml") if "teacher" not in path.stem)
)
def test_packaged_recipes_can_be_read(name: str) -> None:
    assert load_recipe(name).limits.context > 0


def test_a_recipe_written_for_tests_says_what_it_was_given(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    schemes = {"model.layers.0": "float", "lm_head": "w8a16"}
    recipe = load_recipe(write_recipe(tmp_path / "r.toml", quantization={"schemes": schemes, "cache": "int8"}))
    assert {name: scheme.value for name, scheme in recipe.quantization.schemes.items()} == schemes
    assert recipe.quantization.cache is CacheScheme.INT8
