"""Trimmed vocabularies: what stays is split as before, nothing becomes unknown, ids follow everywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonoedge.errors import SonoEdgeError
from sonoedge.export.demo_tokenizer import SPECIAL_TOKENS
from sonoedge.export.models.config_json import read_config
from sonoedge.export.prune.vocabulary import Trimmed, trim_vocabulary
from sonoedge.runtime.tokens import Tokenizer

TEXTS = (
    "Is a lesion visible? 9 mm, 2 × 3 cm.",
    "这是哪个部位？左侧见一低回声结节，大小约9毫米。",
    "Größe: naïve Щ 日本語 🫀",
)


def opened(files: dict[str, bytes]) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode()))


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest checkpoint with every file that names ids."""
    folder = tmp_path_factory.mktemp("words") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    settings_file = folder / "tokenizer_config.json"
    tree = msgspec.json.decode(settings_file.read_bytes())
    tree["added_tokens_decoder"] = {str(index): {"content": token} for token, index in ids.items()}
    settings_file.write_bytes(msgspec.json.encode(tree))
    generation = {"bos_token_id": None, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "top_k": 3}
    generation["pad_token_id"] = ids["<|endoftext|>"]
    (folder / "generation_config.json").write_bytes(msgspec.json.encode(generation))
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def english(checkpoint: Path) -> Trimmed:
    return trim_vocabulary(checkpoint, read_config(checkpoint), ["en"], None)


def test_tokens_of_the_language_are_the_same_tokens(whole: Tokenizer, english: Trimmed) -> None:
    trimmed = opened(english.files)
    assert len(trimmed) == len(english.kept) < len(whole)
    before = whole.encode(TEXTS[0])
    assert [english.kept[index] for index in trimmed.encode(TEXTS[0])] == before
    chinese = trimmed.encode(TEXTS[1])
    assert len(chinese) > len(whole.encode(TEXTS[1])), "Chinese falls back to bytes"


@pytest.mark.parametrize("languages", [["en"], ["zh"], ["en", "zh"]], ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_goes_in_and_out(checkpoint: Path, languages: Any, text: str) -> None:
    trimmed = opened(trim_vocabulary(checkpoint, read_config(checkpoint), languages, None).files)
    assert trimmed.decode(trimmed.encode(text)) == text


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*"abcdefghilmnorstuvy .?,0123456789左右肝脏囊肿结节无见", "lesion", " the", "é", "🫀"]))
)
def test_text_whose_tokens_stay_is_split_as_before(whole: Tokenizer, english: Trimmed, pieces: list[str]) -> None:
    text = "".join(pieces)
    before, trimmed = whole.encode(text), opened(english.files)
    after = [english.kept[index] for index in trimmed.encode(text)]
    assert trimmed.decode(trimmed.encode(text)) == text
    if set(before) <= set(english.kept):
        assert after == before


def test_special_tokens_keep_their_meaning(checkpoint: Path, whole: Tokenizer, english: Trimmed) -> None:
    trimmed = opened(english.files)
    for name in ("image_pad", "vision_start", "vision_end", "im_start", "im_end", "eos"):
        assert english.kept[getattr(trimmed, name)] == getattr(whole, name)
    config, before = english.config(read_config(checkpoint)), read_config(checkpoint)
    assert (config.vocab_size, config.image_token_id) == (len(trimmed), trimmed.image_pad)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (trimmed.vision_start, trimmed.vision_end)
    assert [english.kept[index] for index in config.eos_token_ids] == list(before.eos_token_ids)
    settings_tree = msgspec.json.decode(english.files["tokenizer_config.json"])
    found = {token["content"]: int(index) for index, token in settings_tree["added_tokens_decoder"].items()}
    assert found["<|image_pad|>"] == trimmed.image_pad
    assert len(found) == len(SPECIAL_TOKENS)
    generation = msgspec.json.decode(english.files["generation_config.json"])
    assert generation["eos_token_id"] == list(trimmed.stop_ids)
    assert (generation["pad_token_id"], generation["bos_token_id"], generation["top_k"]) == (trimmed.eos, None, 3)


def test_merges_are_closed(english: Trimmed) -> None:
    model = msgspec.json.decode(english.files["tokenizer.json"])["model"]
    made = {left + right for left, right in model["merges"]}
    for left, right in model["merges"]:
        assert {left, right, left + right} <= model["vocab"].keys()
    added = set(SPECIAL_TOKENS)
    assert all(len(token) == 1 or token in made or token in added for token in model["vocab"])
    assert sorted(model["vocab"].values()) == list(range(len(model["vocab"])))


def test_the_most_frequent_words_fill_what_room_there_is(checkpoint: Path, english: Trimmed, whole: Tokenizer) -> None:
    config = read_config(checkpoint)
    used = whole.encode("结节")
    few = trim_vocabulary(checkpoint, config, ["en"], len(english.kept) - 20, used)
    assert len(few.kept) == len(english.kept) - 20
    assert set(used) <= set(few.kept)
    with pytest.raises(SonoEdgeError, match=r"student.vocabulary = 200 and bytes, control tokens, .* are \d+ tokens"):
        trim_vocabulary(checkpoint, config, ["en"], 200)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree["model"].update(type="Unigram"), "not a tokenizer.json|trims BPE"),
        (
            lambda tree: tree.update(
                post_processor={"type": "BertProcessing", "sep": ["<|im_end|>", 4], "cls": ["<|im_start|>", 5]}
            ),
            "adds tokens of its own to every text",
        ),
    ],
)
def test_tokenizers_that_are_refused(checkpoint: Path, tmp_path: Path, change: Any, words: str) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    tree = msgspec.json.decode(path.read_bytes())
    change(tree)
    path.write_bytes(msgspec.json.encode(tree))
    with pytest.raises(SonoEdgeError, match=words):
        trim_vocabulary(tmp_path / "copy", read_config(checkpoint), ["en"], None)
    path.unlink()
    with pytest.raises(SonoEdgeError, match=r"tokenizer\.json does not exist and student\.languages trims it"):
        trim_vocabulary(tmp_path / "copy", read_config(checkpoint), ["en"], None)


def test_a_real_sized_vocabulary_takes_seconds(tmp_path: Path) -> None:
    """Tens of thousands of tokens, each merged from two before it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens, merges = list(alphabet), []
    known = set(tokens)
    letters = [token for token in tokens if token.isascii() and token.isalpha()]
    words = list(letters)
    for number in range(60_000):
        left, right = words[number * 7919 % len(words)], letters[number % len(letters)]
        if left + right not in known:
            known.add(left + right)
            words.append(left + right)
            tokens.append(left + right)
            merges.append([left, right])
    tree = {
        "version": "1.0",
        "added_tokens": [
            {"id": len(tokens) + n, "content": token, "special": True, "single_word": False, "lstrip": False}
            | {"rstrip": False, "normalized": False}
            for n, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": {token: n for n, token in enumerate(tokens)}, "merges": merges},
    }
    (tmp_path / "tokenizer.json").write_bytes(msgspec.json.encode(tree))
    base = read_config(Path(__file__).parents[2] / "golden" / "echovlm_tiny" / "config.json")
    image = len(tokens) + SPECIAL_TOKENS.index("<|image_pad|>")
    config = msgspec.structs.replace(base, vocab_size=len(tokens) + 8, image_token_id=image)
    trimmed = trim_vocabulary(tmp_path, config, ["en"], 20_000)
    assert len(trimmed.kept) == 20_000
    assert opened(trimmed.files).image_pad == trimmed.config(config).image_token_id
