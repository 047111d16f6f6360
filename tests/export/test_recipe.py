"""Recipes: what is wrong is told with file, key and value; the hash follows what is meant, not how it is written."""

import re
from pathlib import Path

import msgspec
import pytest

from sonoedge.errors import SonoEdgeError
from sonoedge.export.lowering import Scheme
from sonoedge.export.recipe import DEFAULT, Quantization, load_recipe
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
        (r"float =", "float = [3]", "quantization.float[0] = 3: Expected `str`"),
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
    changed.write_text("\n[".join([f"# a remark\n{version}", *reversed(sections[1:])]))
    with pytest.raises(SonoEdgeError, match="missing required field `student`"):
        load_recipe(changed)
    changed.write_text("\n[".join([f"# a remark\n{version}", *(f"{section}\n" for section in reversed(sections))]))
    assert load_recipe(changed).sha256 == before
    spoil(changed, "warmup_steps =", "warmup_steps = 3")
    assert load_recipe(changed).sha256 != before


def test_schemes_follow_the_beginning_of_names() -> None:
    settings = Quantization(Scheme.W8A8, ("visual.merger", "lm_head"))
    assert settings.scheme("visual.merger.mlp.0") is Scheme.FLOAT
    assert settings.scheme("lm_head") is Scheme.FLOAT
    assert settings.scheme("visual.blocks.0.mlp.fc1") is Scheme.W8A8
    assert Quantization(Scheme.FLOAT).scheme("lm_head") is Scheme.FLOAT
    assert msgspec.structs.asdict(Quantization(Scheme.W8A8))["float"] == ()
