"""A tokenizer made for a config: every text goes through it, and special tokens are where the config has them."""

import unicodedata
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonoedge.errors import SonoEdgeError
from sonoedge.export.byte_tokenizer import special_ids, write_byte_tokenizer
from sonoedge.export.checkpoint_files import open_tokenizer
from sonoedge.export.demo_tokenizer import SPECIAL_TOKENS
from sonoedge.export.make_checkpoint import named_config
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.config_json import read_config
from sonoedge.runtime.prompt import answer_ids, prefix_ids, question_ids
from sonoedge.runtime.tokens import Tokenizer

DEMO = Path(__file__).parent.parent.parent / "export" / "demo_checkpoint"


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    """A vocabulary with room between the learnt tokens and the special ones."""
    return named_config("echovlm-500m")


@pytest.fixture(scope="module")
def folder(config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where its tokenizer was written."""
    made = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(config, made)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer as a checkpoint's is opened."""
    return open_tokenizer(folder, config)


@given(text=st.text())
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)  # as Qwen2's own tokenizer does
    assert max(ids, default=0) < 1024  # no text becomes a filler or a special token


def test_prompts_are_built(tokenizer: Tokenizer, config: ModelConfig) -> None:
    prompt = prefix_ids(tokenizer, [3], "zh") + question_ids(tokenizer, "Is a lesion visible?")
    assert prompt.count(config.image_token_id) == 3
    assert config.vision_start_token_id in prompt
    assert config.vision_end_token_id in prompt
    assert answer_ids(tokenizer, "no")[-1] == config.eos_token_ids[0]
    assert len(prompt) < 40  # the phantoms' words were learnt


def test_a_random_model_says_letters(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.decode([20_000])) == 4
    assert len({tokenizer.decode([index]) for index in range(1024, 30_000)}) == 30_000 - 1024


def test_transformers_reads_it_alike(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("Which region is shown?", "是否可见病灶？ 3.5 cm\n"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert theirs.convert_tokens_to_ids("<|image_pad|>") == tokenizer.image_pad
    assert theirs.eos_token_id == tokenizer.im_end


def test_the_full_size_has_the_released_ids() -> None:
    assert special_ids(named_config("echovlm-7b")) == {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": 151652,
        "<|vision_end|>": 151653,
        "<|vision_pad|>": 151654,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
    }


def test_special_tokens_may_come_first(tmp_path: Path) -> None:
    config = read_config(DEMO)
    assert special_ids(config) == {token: index for index, token in enumerate(SPECIAL_TOKENS)}  # as it was trained
    write_byte_tokenizer(config, tmp_path)
    tokenizer = open_tokenizer(tmp_path, config)
    assert tokenizer.decode(tokenizer.encode("Liver, 肝")) == "Liver, 肝"


def test_equal_configs_give_equal_bytes(folder: Path, config: ModelConfig, tmp_path: Path) -> None:
    write_byte_tokenizer(config, tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 263}, "vocab_size 263 is too small for 256 bytes and 8 special tokens; choose at least 264"),
        ({"vocab_size": 32_000}, r"<\|vision_start\|> has the id 32356 and vocab_size is 32000"),
        ({"video_token_id": 32_359}, "special tokens share an id"),
    ],
)
def test_ids_that_cannot_be_are_refused(config: ModelConfig, change: dict[str, int], words: str) -> None:
    with pytest.raises(SonoEdgeError, match=words):
        special_ids(msgspec.structs.replace(config, **change))
