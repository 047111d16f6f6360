"""Greedy answers, one token at a time, with a deadline, a cancel switch, and pauses that give the session away."""

import threading
import time
from collections.abc import Iterator
from typing import Literal

import numpy as np

from sonoedge.runtime.look import Prompt
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

Finish = Literal["stop", "length", "deadline", "cancelled"]  # length: max_tokens or the context is used up


class Generation:
    """One answer in the making; between steps the session may be used for something else after `suspend`."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompt: Prompt,
        *,
        max_tokens: int,
        deadline_ns: int | None = None,
        cancel: threading.Event | None = None,
        held: int = 0,
    ) -> None:
        """Prepare to answer `prompt`; `deadline_ns` is on the clock of `time.monotonic_ns`.

        held: how many of the prompt's tokens, every picture's included, the session's cache begins with already.
        """
        self.ids: list[int] = []  # of the answer so far
        self.finish: Finish | None = None
        self._session = session
        self._prompt = prompt
        self._max_tokens = min(max_tokens, session.spec.context - len(prompt.ids))
        self._deadline_ns = deadline_ns
        self._cancel = cancel
        self._stream = tokenizer.stream()
        self._held = held
        self._cached = False  # whether the session holds the prompt and the answer so far

    def step(self) -> str:
        """Make one token and return the characters that it completes; `finish` says when the answer is over."""
        if self._cancel is not None and self._cancel.is_set():
            self.finish = "cancelled"
        elif self._deadline_ns is not None and time.monotonic_ns() >= self._deadline_ns:
            self.finish = "deadline"
        elif len(self.ids) >= self._max_tokens:
            self.finish = "length"
        if self.finish is not None:
            return ""
        logits = self._logits()[-1].copy()  # [vocab]
        logits[self._session.spec.image_token_id] = -np.inf  # an answer has no picture to put there
        index = int(np.argmax(logits))
        if index in self._session.spec.eos_token_ids:
            self.finish = "stop"
            return ""
        self.ids.append(index)
        return self._stream.push(index)

    def suspend(self) -> None:
        """Say that the session's cache is about to be used by others: the next step fills it again."""
        self._held, self._cached = 0, False

    @property
    def cached_ids(self) -> list[int]:
        """Every token that the session's cache holds; none before the first step and after `suspend`."""
        return [*self._prompt.ids.tolist(), *self.ids][: self._session.length] if self._cached else []

    def _logits(self) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        prompt, answered = self._prompt, len(self.ids)
        if self._cached:
            positions = np.full((3, 1), prompt.next_position + answered - 1, np.int64)
            return self._session.extend(np.array(self.ids[-1:], np.int64), positions)
        held = self._held
        self._session.rewind(held)
        ids = np.concatenate([prompt.ids, np.array(self.ids, np.int64)])
        tail = np.broadcast_to(np.arange(answered) + prompt.next_position, (3, answered))
        positions = np.concatenate([prompt.positions, tail], axis=1)
        pictures = None if held else prompt.embeds
        logits = self._session.extend(ids[held:], positions[:, held:], image_embeds=pictures)
        self._cached = True
        return logits


def generate(
    session: Session,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_tokens: int,
    deadline_ns: int | None = None,
    cancel: threading.Event | None = None,
) -> Iterator[str]:
    """Yield the answer to `prompt` piece by piece, each whole characters, until it ends or must end."""
    generation = Generation(session, tokenizer, prompt, max_tokens=max_tokens, deadline_ns=deadline_ns, cancel=cancel)
    while generation.finish is None:
        if piece := generation.step():
            yield piece
