"""Questions that wait for the worker or are being answered: bounded, cancellable, one id a client at a time."""

import threading
import time
from collections import deque

import msgspec

from sonoedge.runtime.protocol import Ask, Id
from sonoedge.runtime.sight import Sight
from sonoedge.runtime.wire import Envelope


class Question(msgspec.Struct, frozen=True):
    """A question about frozen frames, or the one that was newest when it was asked."""

    envelope: Envelope
    ask: Ask
    sights: tuple[Sight | None, ...]  # None: the first that the worker sees
    received_ns: int
    cancel: threading.Event

    @property
    def seen(self) -> list[Sight]:
        """The sights that there are."""
        return [sight for sight in self.sights if sight is not None]

    @property
    def streams(self) -> bool:
        """Whether its client wants tokens: a REQ socket would take the first of them for the answer."""
        return not self.envelope.delimiter if self.ask.stream is None else self.ask.stream

    @property
    def deadline_ns(self) -> int | None:
        """When it must be over, on the monotonic clock."""
        return None if self.ask.deadline_ms is None else self.received_ns + self.ask.deadline_ms * 1_000_000

    def elapsed_ms(self) -> float:
        """Milliseconds since it came in."""
        return (time.monotonic_ns() - self.received_ns) / 1e6


class QuestionQueue:
    """Between the I/O thread, which puts and cancels, and the worker, which takes and finishes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._waiting: deque[Question] = deque()
        self._open: dict[tuple[bytes, Id], Question] = {}  # waiting or being answered
        self._mean_ms = 500.0  # an answer's own time, smoothed

    def put(self, question: Question) -> str | None:
        """Queue a question; return why not when the queue is full or its client has the id in use."""
        key = (question.envelope.client, question.ask.id)
        with self._lock:
            if key in self._open:
                return f"the question {question.ask.id!r} is still being answered: choose another id"
            if len(self._open) >= self._capacity:
                return f"busy, retry in {self._retry_ms()} ms"
            self._open[key] = question
            self._waiting.append(question)
            return None

    def take(self) -> Question | None:
        """Take the oldest question; None when none waits."""
        with self._lock:
            return self._waiting.popleft() if self._waiting else None

    def finish(self, question: Question, took_ms: float | None) -> None:
        """Forget a question that has its reply; `took_ms` teaches how long an answer takes."""
        with self._lock:
            self._open.pop((question.envelope.client, question.ask.id), None)
            if took_ms is not None:
                self._mean_ms += 0.25 * (took_ms - self._mean_ms)

    def cancel(self, client: bytes, question_id: Id | None = None) -> bool:
        """Cancel one question of a client, or all of them; False when there is none."""
        with self._lock:
            found = [q for (who, which), q in self._open.items() if who == client and question_id in (None, which)]
        for question in found:
            question.cancel.set()
        return bool(found)

    @property
    def retry_ms(self) -> int:
        """When the queue should have room again."""
        with self._lock:
            return self._retry_ms()

    def _retry_ms(self) -> int:
        return max(10, round(self._mean_ms * len(self._open) / 2))

    def __len__(self) -> int:
        with self._lock:
            return len(self._open)
