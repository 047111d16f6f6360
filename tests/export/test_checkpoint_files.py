"""What stands beside the weights: how pictures are prepared, and a tokenizer that fits the model."""

from pathlib import Path

import msgspec
import pytest

from sonoedge.bundle import ImageSpec
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import ECHOVLM_MAX_PIXELS, image_spec, open_tokenizer
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.config_json import read_config


def write(folder: Path, text: str) -> Path:
    (folder / "preprocessor_config.json").write_text(text)
    return folder


def test_without_a_file_echovlms_own_limits_hold(tmp_path: Path) -> None:
    assert image_spec(tmp_path) == ImageSpec()
    assert ImageSpec().max_pixels == ECHOVLM_MAX_PIXELS == 153_664


def test_a_smaller_limit_holds_and_a_larger_one_does_not(tmp_path: Path) -> None:
    assert image_spec(write(tmp_path, '{"max_pixels": 28224, "min_pixels": 784}')).max_pixels == 28224
    assert image_spec(tmp_path).min_pixels == 784
    assert image_spec(write(tmp_path, '{"max_pixels": 12845056}')).max_pixels == ECHOVLM_MAX_PIXELS
    small = image_spec(write(tmp_path, '{"max_pixels": 784}'))
    assert (small.min_pixels, small.max_pixels) == (784, 784)


def test_bounds_may_stand_under_size_alone(tmp_path: Path) -> None:
    """As transformers' quick image processors write them; keys of their own come first where both stand."""
    size = '"size": {"shortest_edge": 784, "longest_edge": 28224}'
    for text in ("{" + size + "}", '{"min_pixels": null, "max_pixels": null, ' + size + "}"):
        spec = image_spec(write(tmp_path, text))
        assert (spec.min_pixels, spec.max_pixels) == (784, 28224)
    spec = image_spec(write(tmp_path, '{"min_pixels": 1568, "max_pixels": 3136, ' + size + "}"))
    assert (spec.min_pixels, spec.max_pixels) == (1568, 3136)
    assert image_spec(write(tmp_path, '{"size": {"max_pixels": 28224}, "image_mean": null}')) == ImageSpec()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "Expected `object`"),
        ('{"max_pixels": "many"}', "Expected `int`, got `str` - at `$.max_pixels`"),
        ('{"max_pixels": 783}', "max_pixels = 783 and one merged patch has 784"),
        ('{"size": {"longest_edge": 783}}', "max_pixels = 783 and one merged patch has 784"),
        ('{"size": {"shortest_edge": 0}}', ">= 1 - at `$.size.shortest_edge`"),
        ('{"patch_size": 0}', ">= 1 - at `$.patch_size`"),
        ('{"image_std": [0.2, 0, 0.2]}', "> 0.0 - at `$.image_std[1]`"),
        ('{"image_mean": [0.5]}', "at `$.image_mean`"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SonoEdgeError, match=r"preprocessor_config\.json") as refusal:
        image_spec(write(tmp_path, text))
    assert words in str(refusal.value)


def test_a_tokenizer_that_fits(tiny_checkpoint: Path) -> None:
    tokenizer = open_tokenizer(tiny_checkpoint, read_config(tiny_checkpoint))
    assert tokenizer.image_pad == 511
    assert len(tokenizer) == 512


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 500}, "has 512 tokens and vocab_size = 500"),
        ({"image_token_id": 3}, r"has <\|image_pad\|> at 511 and image_token_id = 3"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tiny_checkpoint: Path, change: dict[str, int], words: str) -> None:
    config: ModelConfig = msgspec.structs.replace(read_config(tiny_checkpoint), **change)
    with pytest.raises(SonoEdgeError, match=words):
        open_tokenizer(tiny_checkpoint, config)


def test_a_missing_tokenizer_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(SonoEdgeError, match=r"there is no tokenizer at .*tokenizer\.json"):
        open_tokenizer(tmp_path, read_config(tiny_checkpoint))
