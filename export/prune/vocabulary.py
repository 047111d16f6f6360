"""A smaller vocabulary: tokens of the languages that are needed, and whatever a byte-level BPE builds them from.

Every byte stays a token, so that any text still becomes tokens. Every merge stays whose two parts and result stay, and
with a token its parts stay: text whose tokens all stay is split as before. Source of the closure: R. Sennrich et al.,
"Neural machine translation of rare words with subword units" (arXiv 1508.07909): a token comes of earlier ones alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import decoders, pre_tokenizers

from sonoedge.bundle import TOKENIZER_FILE
from sonoedge.errors import SonoEdgeError
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.prune.section import Language
from sonoedge.runtime.prompt import SYSTEM
from sonoedge.runtime.tokens import Tokenizer

SETTINGS_FILE, GENERATION_FILE = "tokenizer_config.json", "generation_config.json"
ROLES = ("system\n", "user\n", "assistant\n", "\n")
# Inclusive ranges of characters. Common: ASCII without letters, signs of Latin-1, typography, arrows, mathematics.
COMMON: tuple[tuple[int, int], ...] = (
    (0x00, 0x40), (0x5B, 0x60), (0x7B, 0xBF), (0xD7, 0xD7), (0xF7, 0xF7), (0x2010, 0x203A), (0x2103, 0x2103),
    (0x2190, 0x2193), (0x2200, 0x22FF),
)  # fmt: skip
LETTERS: dict[Language, tuple[tuple[int, int], ...]] = {
    "en": ((0x41, 0x5A), (0x61, 0x7A)),
    "zh": ((0x3000, 0x303F), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x2460, 0x2473)),
}


TOKEN_ID_FIELDS = (
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "bos_token_id",
    "pad_token_id",
    "eos_token_ids",
)


class Trimmed(msgspec.Struct, frozen=True):
    """A vocabulary that lost tokens."""

    kept: tuple[int, ...]  # the teacher's id of each token of the student
    files: dict[str, bytes]  # rewritten, by name

    def new_id(self, old: int) -> int:
        """The student's id of a token that stays."""
        return self.kept.index(old)

    def config(self, teacher: ModelConfig) -> ModelConfig:
        """The teacher's config with the student's ids and vocabulary size."""
        named = {name: _mapped(getattr(teacher, name), self.new_id) for name in TOKEN_ID_FIELDS}
        return msgspec.structs.replace(teacher, vocab_size=len(self.kept), **named)


def trim_vocabulary(
    checkpoint: Path, config: ModelConfig, languages: Sequence[Language], most: int | None, used: Iterable[int] = ()
) -> Trimmed:
    """Trim a checkpoint's vocabulary to `languages`, and to their `most` tokens of lowest id, which BPE learnt first.

    used: ids that stay beside bytes, control tokens and the words of every prompt. Raises SonoEdgeError when the
    tokenizer is missing or no byte-level BPE, or when what must stay is more than `most`.
    """
    tree = _read(checkpoint / TOKENIZER_FILE)
    tokenizer = Tokenizer.from_file(checkpoint / TOKENIZER_FILE)  # refuses what is not byte-level
    model = tree.get("model", {})
    if model.get("type") != "BPE":
        raise SonoEdgeError(
            f"{checkpoint / TOKENIZER_FILE} is a {model.get('type')!r} tokenizer and student.languages trims BPE: "
            "leave the key out"
        )
    vocabulary: dict[str, int] = model["vocab"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    parts = {left + right: (left, right) for left, right in reversed(merges)}
    token_of = {index: token for token, index in vocabulary.items()}
    kept = {vocabulary[byte] for byte in pre_tokenizers.ByteLevel.alphabet() if byte in vocabulary}
    kept |= {token["id"] for token in tree.get("added_tokens", ())} | _named_ids(config, checkpoint)
    prompts = (id_ for text in (*SYSTEM.values(), *ROLES) for id_ in tokenizer.encode(text))
    for index in {*prompts, *used}:
        kept |= _family(index, token_of, vocabulary, parts)
    if most is not None and len(kept) > most:
        raise SonoEdgeError(
            f"student.vocabulary = {most} and bytes, control tokens, prompts and the data's own words are {len(kept)} "
            "tokens: choose at least that"
        )
    decoder, spoken = decoders.ByteLevel(), _spoken(languages)
    for index, token in sorted(token_of.items()):
        if index not in kept and token in parts and spoken.fullmatch(decoder.decode([token])):
            missing = _family(index, token_of, vocabulary, parts) - kept
            if most is None or len(kept) + len(missing) <= most:
                kept |= missing
            if len(kept) == most:
                break
    ordered = tuple(sorted(kept))
    return Trimmed(ordered, _rewritten(checkpoint, tree, merges, {old: new for new, old in enumerate(ordered)}))


def _family(
    index: int, token_of: Mapping[int, str], vocabulary: Mapping[str, int], parts: Mapping[str, tuple[str, str]]
) -> set[int]:
    """A token and all that it is merged from."""
    found, waiting = {index}, [token_of.get(index, "")]
    while waiting:
        for part in parts.get(waiting.pop(), ()):
            found.add(vocabulary[part])
            waiting.append(part)
    return found


def _spoken(languages: Sequence[Language]) -> re.Pattern[str]:
    """Text of the languages; half a character is of none, and stays where the whole one does."""
    ranges = (*COMMON, *(one for language in languages for one in LETTERS[language]))
    return re.compile("[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in ranges) + "]+")


def _rewritten(
    checkpoint: Path, tree: dict[str, Any], merges: Sequence[tuple[str, ...]], new: Mapping[int, int]
) -> dict[str, bytes]:
    model = tree["model"]
    vocabulary = {token: new[old] for token, old in model["vocab"].items() if old in new}
    stay = [[left, right] for left, right in merges if all(one in vocabulary for one in (left, right, left + right))]
    tree = tree | {
        "model": model | {"vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])), "merges": stay},
        "added_tokens": [token | {"id": new[token["id"]]} for token in tree.get("added_tokens", ())],
    }
    if (tree.get("post_processor") or {}).get("type") not in (None, "ByteLevel"):
        raise SonoEdgeError(
            f"{checkpoint / TOKENIZER_FILE} adds tokens of its own to every text ({tree['post_processor']['type']}): "
            "leave student.languages out, or use the tokenizer.json of a Qwen2-VL checkpoint"
        )
    files = {TOKENIZER_FILE: _json(tree)}
    if (checkpoint / SETTINGS_FILE).is_file():
        settings = _read(checkpoint / SETTINGS_FILE)
        if "added_tokens_decoder" in settings:
            added = settings["added_tokens_decoder"].items()
            settings["added_tokens_decoder"] = {str(new[int(old)]): token for old, token in added if int(old) in new}
        files[SETTINGS_FILE] = _json(settings)
    if (checkpoint / GENERATION_FILE).is_file():
        generation = _read(checkpoint / GENERATION_FILE)
        for key in filter(_is_id, generation):
            generation[key] = _mapped(generation[key], new.__getitem__)
        files[GENERATION_FILE] = _json(generation)
    return files


def _named_ids(config: ModelConfig, checkpoint: Path) -> set[int]:
    """The ids that config.json and generation_config.json name."""
    values = [getattr(config, name) for name in TOKEN_ID_FIELDS]
    if (checkpoint / GENERATION_FILE).is_file():
        generation = _read(checkpoint / GENERATION_FILE)
        values += [generation[key] for key in filter(_is_id, generation)]
    listed = (value if isinstance(value, list | tuple) else (value,) for value in values)
    return {index for some in listed for index in some if index is not None}


def _is_id(key: str) -> bool:
    return key.endswith(("token_id", "token_ids"))


def _mapped(value: Any, new_id: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(new_id, value))
    return None if value is None else new_id(value)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise SonoEdgeError(f"{path} does not exist and student.languages trims it: copy it from the checkpoint again")
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SonoEdgeError(f"{path} is not a JSON object ({error}): copy it from the checkpoint again") from error


def _json(tree: Mapping[str, Any]) -> bytes:
    return msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n"
