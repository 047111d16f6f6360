"""A tokenizer for checkpoints that come without one: a token a byte, special tokens where the config has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from sonoedge.bundle import TOKENIZER_FILE
from sonoedge.calibration.phantom import KINDS, REGIONS, Lesion, Truth
from sonoedge.errors import SonoEdgeError
from sonoedge.export.demo_tokenizer import SPECIAL_TOKENS, train_tokenizer
from sonoedge.export.models.config import ModelConfig

TRAINED_TOKENS = 1024  # bytes and merges learnt from the phantoms' questions, so that prompts have realistic lengths
LEAST_TOKENS = 256 + len(SPECIAL_TOKENS)
FILLER_LETTERS = 4  # more where those are not enough


def write_byte_tokenizer(config: ModelConfig, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json with Qwen2-VL's special tokens at the ids that `config` names.

    Ids between the learnt tokens and the special ones stand for a few letters each, which a random model may say and no
    text becomes. Raises SonoEdgeError when vocab_size is too small or two tokens share an id.
    """
    special = special_ids(config)
    learnt = train_tokenizer(list(_truths()), min(config.vocab_size, TRAINED_TOKENS), seed=0)
    tree: dict[str, Any] = json.loads(learnt.to_str())
    plain = sorted((index, token) for token, index in tree["model"]["vocab"].items() if token not in special)
    free = (index for index in range(config.vocab_size) if index not in special.values())
    vocabulary = {token: next(free) for _, token in plain}
    words = (
        "".join(letters) for length in count(FILLER_LETTERS) for letters in product(ascii_lowercase, repeat=length)
    )
    fillers = (word for word in words if word not in vocabulary)
    last = max(special.values())
    for index in free:
        if index > last:
            break
        vocabulary[next(fillers)] = index
    tree["model"]["vocab"] = vocabulary | special
    added = ({**token, "id": special[token["content"]]} for token in tree["added_tokens"])
    tree["added_tokens"] = sorted(added, key=lambda token: int(token["id"]))
    (folder / TOKENIZER_FILE).write_text(json.dumps(tree, ensure_ascii=False) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "model_max_length": config.max_position_embeddings,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def special_ids(config: ModelConfig) -> dict[str, int]:
    """The id of each special token: the config's, and for those that it does not name, the next one as in Qwen2-VL."""
    if config.vocab_size < LEAST_TOKENS:
        raise SonoEdgeError(
            f"vocab_size {config.vocab_size} is too small for 256 bytes and {len(SPECIAL_TOKENS)} special tokens; "
            f"choose at least {LEAST_TOKENS}."
        )
    ids = {
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
    }
    if config.eos_token_ids:
        ids["<|im_end|>"] = config.eos_token_ids[0]
    # Qwen2-VL begins, pads and ends documents with one token: any of these keys names it.
    ends = (*config.eos_token_ids[1:2], config.pad_token_id, config.bos_token_id)
    end = next((index for index in ends if index is not None and index not in ids.values()), None)
    if end is not None:
        ids["<|endoftext|>"] = end
    for token, index in ids.items():
        if index >= config.vocab_size:
            raise SonoEdgeError(
                f"{token} has the id {index} and vocab_size is {config.vocab_size}; choose a smaller id."
            )
    if len(set(ids.values())) < len(ids):
        raise SonoEdgeError(f"special tokens share an id ({ids}); give each its own.")
    previous = -1
    for token in SPECIAL_TOKENS:
        if token not in ids:
            taken = set(ids.values())
            after = (*range(previous + 1, config.vocab_size), *range(previous))
            ids[token] = next(index for index in after if index not in taken)
        previous = ids[token]
    return ids


def _truths() -> Iterator[Truth]:
    """Frames of every region, with and without each kind of lesion, whose questions the merges are learnt from."""
    for region in REGIONS:
        yield Truth(region, "good", "linear", 0.2, None, seed=0, size=224)
        for kind in KINDS:
            left = Lesion(kind, "left", radius_px=20.0, size_mm=9.0, depth_mm=15.0, centre_px=(60.0, 50.0))
            right = Lesion(kind, "right", radius_px=20.0, size_mm=12.0, depth_mm=30.0, centre_px=(160.0, 170.0))
            yield Truth(region, "good", "linear", 0.2, left, seed=0, size=224)
            yield Truth(region, "poor", "curved", 0.2, right, seed=0, size=224)
