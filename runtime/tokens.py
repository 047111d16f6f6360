"""Text to token ids and back, for byte-level tokenizers; text can never become a special token."""

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from sonoedge.errors import SonoEdgeError

_SPECIALS = {
    "image_pad": "<|image_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "eos": "<|endoftext|>",
}


def _byte_of_character() -> dict[str, int]:
    """Return the byte behind each character of a byte-level vocabulary (GPT-2's: printable ones mean themselves)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


class Tokenizer:
    """A byte-level tokenizer with Qwen2-VL's special tokens, whose ids are attributes."""

    image_pad: int
    vision_start: int
    vision_end: int
    im_start: int
    im_end: int
    eos: int

    def __init__(self, inner: tokenizers.Tokenizer, name: str = "tokenizer") -> None:
        """Wrap `inner`; raises SonoEdgeError when a special token is missing or the vocabulary is not byte-level."""
        self._inner = inner
        self._inner.encode_special_tokens = True  # "<|im_end|>" in a question is text like any other
        self._inner.no_padding()
        self._inner.no_truncation()
        if "ByteLevel" not in repr(inner.decoder):
            raise SonoEdgeError(f"{name} is not byte-level: use the tokenizer.json of a Qwen2-VL checkpoint")
        for attribute, token in _SPECIALS.items():
            token_id = inner.token_to_id(token)
            if token_id is None:
                raise SonoEdgeError(f"{name} has no token {token}: use the tokenizer.json of a Qwen2-VL checkpoint")
            setattr(self, attribute, token_id)
        added = inner.get_added_tokens_decoder()
        self._added = frozenset(added) | {getattr(self, attribute) for attribute in _SPECIALS}
        plain = [re.escape(token.content) for token in added.values() if not token.special]
        self._added_text = re.compile(f"(?={'|'.join(plain)})") if plain else None
        vocabulary = inner.get_vocab(with_added_tokens=True)
        table = _byte_of_character()
        self._bytes = [b""] * (max(vocabulary.values()) + 1)
        for token, index in vocabulary.items():
            if index not in added and all(character in table for character in token):
                self._bytes[index] = bytes(table[character] for character in token)

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """Read a `tokenizer.json`; raises SonoEdgeError when it is missing or unreadable."""
        if not Path(path).is_file():
            raise SonoEdgeError(f"there is no tokenizer at {path}: give the path of a tokenizer.json")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every kind of bad file
            raise SonoEdgeError(
                f"{path} is not a tokenizer.json ({error}): copy it from the checkpoint again"
            ) from error
        return cls(inner, str(path))

    @property
    def stop_ids(self) -> tuple[int, int]:
        """The ids that end an answer."""
        return self.im_end, self.eos

    def __len__(self) -> int:
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as plain text, whatever it looks like."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=False).ids
        if self._added_text is not None and not self._added.isdisjoint(ids):
            # Added tokens that are not "special" (<tool_call>) are recognised even so: cut each of them in two.
            cuts = [match.start() + 1 for match in self._added_text.finditer(text)]
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
            ids = [index for piece in pieces for index in self._inner.encode(piece, add_special_tokens=False).ids]
        if not self._added.isdisjoint(ids):
            raise SonoEdgeError(f"the text {text!r} spells a control token of the tokenizer: write it differently")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, special tokens and a character cut off at the end left out."""
        stream = self.stream()
        return "".join(stream.push(index) for index in ids)

    def stream(self) -> "TokenStream":
        """Return a decoder that takes one id at a time."""
        return TokenStream(self._bytes)


class TokenStream:
    """Decodes one id at a time and never emits half a UTF-8 character."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, index: int) -> str:
        """Return the characters that `index` completes; an id outside the vocabulary or a special token gives none."""
        return self._decoder.decode(self._token_bytes[index]) if 0 <= index < len(self._token_bytes) else ""
