"""A deterministic session for tests: its answers follow the picture's mean brightness and the question alone."""

import re
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.hints import HintSchema
from sonoedge.runtime.preprocess import ImageSpec, Patches
from sonoedge.runtime.sessions.base import DecoderSpec
from sonoedge.runtime.tokens import Tokenizer

HIDDEN = 8
SURE = 12.0  # the logit of the token that the fake wants next; every other is 0


class FakeSession:
    """Answers hint questions with a candidate chosen by brightness, and other questions with a sentence about it.

    It reads what each token may see, so a wrong mask, position or rewind changes or refuses its answers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        schema: HintSchema,
        *,
        context: int = 4096,
        step_s: float = 0.0,
        image: ImageSpec | None = None,
    ) -> None:
        """Make a session that spends `step_s` in every `extend`."""
        self.spec = DecoderSpec(
            hidden=HIDDEN,
            layers=1,
            heads=1,
            kv_heads=1,
            head_dim=HIDDEN,
            vocab=len(tokenizer),
            context=context,
            image_token_id=tokenizer.image_pad,
            eos_token_ids=tokenizer.stop_ids,
        )
        self.image = image or ImageSpec()
        self.closed = False
        self._tokenizer = tokenizer
        self._schema = schema
        self._step_s = step_s
        self._ids: list[int] = []
        self._brightness: list[float] = []  # of each cached token; nan for text
        self._last_position: list[int] = []
        self._seen: list[npt.NDArray[np.int64] | None] = []  # what each cached token sees; None: all before it

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self._ids)

    def encode_image(self, patches: Patches) -> npt.NDArray[np.float32]:
        """Return embeddings [merged, hidden] that hold the picture's brightness, 0 to 1."""
        mean, std = np.array(self.image.mean), np.array(self.image.std)
        pixels = patches.values.reshape(len(patches.values), 3, -1).mean(axis=(0, 2))  # [3]
        merged = len(patches.values) // self.image.merge_size**2
        return np.full((merged, HIDDEN), float((pixels * std + mean).mean()), np.float32)

    def rewind(self, length: int) -> None:
        """Forget every token after the first `length`."""
        if not 0 <= length <= self.length:
            raise SonoEdgeError(f"the cache holds {self.length} tokens and cannot be rewound to {length}")
        for kept in (self._ids, self._brightness, self._last_position, self._seen):
            del kept[length:]

    def extend(
        self,
        ids: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        *,
        image_embeds: npt.NDArray[np.float32] | None = None,
        visible: npt.NDArray[np.bool_] | None = None,
        logits_rows: npt.NDArray[np.int64] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Append tokens; a text token must stand right after the last position that it sees."""
        before = self.length
        if before + len(ids) > self.spec.context:
            raise SonoEdgeError(f"{before + len(ids)} tokens do not fit the context of {self.spec.context}")
        shape = (len(ids), before + len(ids))
        if (visible is not None and visible.shape != shape) or positions.shape != (3, len(ids)):
            raise SonoEdgeError(f"positions are {positions.shape} and visible is not {shape} for {len(ids)} tokens")
        bright = iter(image_embeds[:, 0].tolist() if image_embeds is not None else [])
        reach = max(self._last_position, default=-1)  # the largest position of every token before
        for row, index in enumerate(ids.tolist()):
            seen = None if visible is None else np.flatnonzero(visible[row, : before + row])
            if seen is not None:
                reach = max((self._last_position[token] for token in seen), default=-1)
            is_image = index == self.spec.image_token_id
            if not is_image and not (positions[:, row] == reach + 1).all():
                raise SonoEdgeError(f"token {before + row} stands at {positions[:, row]} and should at {reach + 1}")
            self._ids.append(index)
            self._brightness.append(next(bright) if is_image else float("nan"))
            self._last_position.append(int(positions[:, row].max()))
            self._seen.append(None if seen is None else np.append(seen, before + row))
            reach = max(reach, self._last_position[-1])
        if self._step_s:
            time.sleep(self._step_s)
        rows = [len(ids) - 1] if logits_rows is None else logits_rows.tolist()
        logits = np.zeros((len(rows), self.spec.vocab), np.float32)
        for number, row in enumerate(rows):
            seen = self._seen[before + row]
            logits[number, self._next(range(before + row + 1) if seen is None else seen.tolist())] = SURE
        return logits

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True

    def _next(self, seen: Sequence[int]) -> int:
        """The token that the fake wants after the tokens `seen`."""
        t, ids = self._tokenizer, [self._ids[token] for token in seen]
        if ids.count(t.im_start) < 3 or t.vision_end not in ids:  # the assistant's turn has not begun
            return t.im_end
        vision_end = len(ids) - 1 - ids[::-1].index(t.vision_end)
        turn = len(ids) - 1 - ids[::-1].index(t.im_start)
        opening = len(t.encode("assistant\n"))
        answered = ids[turn + 1 + opening :]
        brightness = float(np.nanmean([self._brightness[token] for token in seen]))
        answer = [*t.encode(self.answer(t.decode(ids[vision_end + 1 : turn]).strip(), brightness)), t.im_end]
        return (
            answer[len(answered)] if answered == answer[: len(answered)] and len(answered) < len(answer) else t.im_end
        )

    def answer(self, question: str, brightness: float) -> str:
        """Return the words that answer `question` about a picture of the given brightness, 0 to 1.

        A single choice ("… A. one B. other") is answered with a letter, the further down the brighter.
        """
        letters = re.findall(r"(?<= )([A-J])\. ", question)
        if letters:
            return str(letters[min(int(brightness * len(letters)), len(letters) - 1)])
        for hint in self._schema.hints:
            candidate = hint.candidates[min(int(brightness * len(hint.candidates)), len(hint.candidates) - 1)]
            if question == hint.question.en:
                return candidate.en
            if question == hint.question.zh:
                return candidate.zh
        return f"亮度 {round(100 * brightness)} %: {question}"
