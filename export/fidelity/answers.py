"""Greedy answers and the distributions behind them, one prefix a frame and the cache rewound between questions.

A variant answers token by token, as it is served. The float model never steps through an answer that a variant has
found as well: the variant drafts and one pass checks the draft, which gives the float model's greedy answer exactly.
Source: Y. Leviathan et al., "Fast inference from transformers via speculative decoding" (arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from sonoedge.errors import SonoEdgeError
from sonoedge.export.fidelity.metrics import Floats
from sonoedge.runtime.frame import Frame
from sonoedge.runtime.look import Look, Prompt, Prompter, look_at
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

UNSPEAKABLE = np.float32(-1e9)  # the logit of the image token, which no answer can hold


class Answer(msgspec.Struct, frozen=True):
    """Tokens of an answer, the end of the turn included where it was reached, and the logits that chose each."""

    tokens: tuple[int, ...]  # n
    logits: Floats  # [n, vocab]


class Asker:
    """One session that answers questions about pictures it has looked at."""

    def __init__(self, name: str, session: Session, tokenizer: Tokenizer) -> None:
        self.session, self._name = session, name
        self._prompter = Prompter(session, tokenizer)
        self._prefix = Prompt(np.empty(0, np.int64), np.empty((3, 0), np.int64), 0, np.empty((0, 0), np.float32))

    def look(self, images: Sequence[npt.NDArray[np.uint8]]) -> tuple[Look, ...]:
        """Encode the pictures of a case."""
        return tuple(look_at(self.session, Frame(image, 0, 0, None, "fidelity")) for image in images)

    def begin(self, looks: Sequence[Look], language: str) -> None:
        """Put the pictures and what comes before a question into the cache."""
        self._prefix = self._prompter.prefix(looks, language)
        if len(self._prefix.ids) >= self.session.spec.context:
            raise SonoEdgeError(
                f"the pictures take {len(self._prefix.ids)} tokens and the context holds {self.session.spec.context}: "
                "raise limits.context in the recipe"
            )
        self.session.rewind(0)
        self.session.extend(self._prefix.ids, self._prefix.positions, image_embeds=self._prefix.embeds)

    def room(self, question: Sequence[int]) -> int:
        """How many tokens an answer to `question` may have."""
        return self.session.spec.context - len(self._prefix.ids) - len(question)

    def greedy(self, question: Sequence[int], limit: int) -> Answer:
        """The likeliest token after the likeliest token, at most `limit` of them, each made as it is served: alone."""
        self.session.rewind(len(self._prefix.ids))
        return self._continued(question, (), self._extend(question, 0, 1), limit)

    def along(self, question: Sequence[int], tokens: Sequence[int], own: Answer) -> Floats:
        """The logits [n, vocab] that this session gives where each of n `tokens` is due, token by token as served.

        own: what `greedy` just gave for the question; its logits hold up to where it leaves `tokens`.
        """
        pairs = enumerate(zip(own.tokens, tokens, strict=False))
        common = next((index for index, (mine, other) in pairs if mine != other), len(tokens) - 1)
        self.session.rewind(len(self._prefix.ids) + len(question) + common)
        rest = range(common, len(tokens) - 1)
        rows = [self._extend(tokens[index : index + 1], len(question) + index, 1) for index in rest]
        return np.concatenate([own.logits[: common + 1], *rows])

    def checked(self, question: Sequence[int], draft: Sequence[int], limit: int) -> Answer:
        """This session's greedy answer and its logits, found quickly where it is the one that was drafted."""
        self.session.rewind(len(self._prefix.ids))
        logits = self._extend([*question, *draft[:-1]], 0, len(draft))  # [n, vocab]
        own = logits.argmax(axis=1)
        differs = np.flatnonzero(own != np.asarray(draft))
        if not differs.size:
            return Answer(tuple(draft), logits)
        agreed = int(differs[0])
        self.session.rewind(len(self._prefix.ids) + len(question) + agreed)
        return self._continued(question, draft[:agreed], logits[: agreed + 1], limit)

    def whole(self, question: Sequence[int], tokens: Sequence[int]) -> Prompt:
        """Pictures, question and answer in one piece, the answer's last token left out as nothing follows it."""
        ids = np.array([*question, *tokens[:-1]], np.int64)
        prefix = self._prefix
        return Prompt(
            np.concatenate([prefix.ids, ids]),
            np.concatenate([prefix.positions, self._positions(len(ids))], axis=1),
            prefix.next_position + len(ids),
            prefix.embeds,
        )

    def _continued(self, question: Sequence[int], tokens: Sequence[int], logits: Floats, limit: int) -> Answer:
        """Go on from `tokens`, which are in the cache; logits [n + 1, vocab] chose them and choose the next."""
        chosen, rows = [*tokens, int(logits[-1].argmax())], [logits]
        while chosen[-1] not in self.session.spec.eos_token_ids and len(chosen) < limit:
            rows.append(self._extend(chosen[-1:], len(question) + len(chosen) - 1, 1))
            chosen.append(int(rows[-1][0].argmax()))
        return Answer(tuple(chosen), np.concatenate(rows))

    def _extend(self, ids: Sequence[int], offset: int, rows: int) -> Floats:
        """Feed `ids`, the first of them `offset` tokens behind the prefix; the logits of the last `rows`."""
        wanted = np.arange(len(ids) - rows, len(ids))
        logits = self.session.extend(np.array(ids, np.int64), self._positions(len(ids), offset), logits_rows=wanted)
        return spoken(logits, self.session.spec.image_token_id, self._name)

    def _positions(self, count: int, offset: int = 0) -> npt.NDArray[np.int64]:
        """Positions [3, count] of text that starts `offset` tokens behind the prefix."""
        return np.tile(self._prefix.next_position + offset + np.arange(count), (3, 1))


def spoken(logits: Floats, image_token_id: int, name: str) -> Floats:
    """A copy of logits [n, vocab] with the image token out of reach; raises SonoEdgeError when one is not finite."""
    if not np.isfinite(logits).all():
        raise SonoEdgeError(f"{name} gives logits that are not finite: keep more products float in the recipe")
    own: Floats = logits.copy()  # a session may use its memory again
    own[:, image_token_id] = UNSPEAKABLE
    return own
