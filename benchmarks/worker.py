"""A contender in a process of its own: it loads once, then times what it is asked, one JSON line each way."""

from __future__ import annotations

import os
import sys
from typing import Protocol

import msgspec


class Decode(msgspec.Struct, frozen=True, tag=True):
    """Generate `tokens` tokens greedily, one at a time, after a prompt that is not timed."""

    prompt: int
    tokens: int


class Prefill(msgspec.Struct, frozen=True, tag=True):
    """Run a prompt of `tokens` tokens in one pass, up to the logits of the last."""

    tokens: int


class Vision(msgspec.Struct, frozen=True, tag=True):
    """Encode one image of the largest size that the model takes."""


Task = Decode | Prefill | Vision


class Facts(msgspec.Struct, frozen=True):
    """What a contender says of itself once it is loaded."""

    version: str
    weight_bytes: int  # of all its weights as they are stored


class Timing(msgspec.Struct, frozen=True):
    """What a task took."""

    seconds: float


class Contender(Protocol):
    """One loaded model; every method gives seconds, and starts with an empty KV cache."""

    facts: Facts

    def decode(self, prompt: int, tokens: int) -> float:
        """Time `tokens` greedy steps after `prompt` tokens."""
        ...

    def prefill(self, tokens: int) -> float:
        """Time one pass over `tokens` tokens."""
        ...

    def vision(self) -> float:
        """Time one image."""
        ...


class LanguageModel:
    """What a contender without a vision tower inherits."""

    def vision(self) -> float:
        """Refuse: nothing here sees."""
        raise NotImplementedError("this contender has no vision tower")


def prompt_ids(tokens: int, vocab: int) -> list[int]:
    """The prompt that every contender is given: ids spread over the lower half of the vocabulary."""
    return [(7919 * index + 11) % (vocab // 2) for index in range(tokens)]


def protocol_output() -> int:
    """Standard output, for this module alone: what libraries print goes to standard error from now on."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


def serve(contender: Contender, output: int) -> None:
    """Say the facts, then answer tasks from standard input until it ends."""
    with open(output, "wb", buffering=0) as replies:
        replies.write(msgspec.json.encode(contender.facts) + b"\n")
        for line in sys.stdin.buffer:
            replies.write(msgspec.json.encode(Timing(_time(contender, msgspec.json.decode(line, type=Task)))) + b"\n")


def _time(contender: Contender, task: Task) -> float:
    match task:
        case Decode(prompt, tokens):
            return contender.decode(prompt, tokens)
        case Prefill(tokens):
            return contender.prefill(tokens)
        case Vision():
            return contender.vision()
