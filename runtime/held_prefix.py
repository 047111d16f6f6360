"""What the session's cache begins with, so that a prompt about the same pictures runs only what is new in it."""

from collections.abc import Sequence

import numpy as np

from sonoedge.runtime.look import Look, Prompt


class HeldPrefix:
    """Kept by the one who uses the session: it must be told of every use."""

    def __init__(self) -> None:
        self._looks: tuple[Look, ...] = ()
        self._ids = np.empty(0, np.int64)

    def hold(self, looks: Sequence[Look], ids: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Remember that the cache holds exactly the tokens `ids` about the pictures `looks`."""
        self._looks, self._ids = tuple(looks), np.array(ids, np.int64)

    def forget(self) -> None:
        """Remember nothing: the cache holds something else, or one cannot know."""
        self.hold((), ())

    def shared(self, looks: Sequence[Look], prefix: Prompt, prompt: Prompt) -> int:
        """Return how many tokens of `prompt` the cache begins with: 0, or at least `prefix`, its pictures' part.

        At least one token is left over, for there is no answer without running one.
        """
        same = len(looks) == len(self._looks) and all(a is b for a, b in zip(looks, self._looks, strict=True))
        common = min(len(self._ids), len(prompt.ids) - 1)
        if not same or common < len(prefix.ids):
            return 0
        differ = np.flatnonzero(self._ids[:common] != prompt.ids[:common])
        shared = int(differ[0]) if len(differ) else common
        return shared if shared >= len(prefix.ids) else 0
