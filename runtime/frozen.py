"""Frames that clients froze: a bounded number, each under a name, for an hour."""

import time

from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.protocol import LIVE, NamedFrame
from sonoedge.runtime.sight import Sight

MOST_FRAMES = 8
KEPT_S = 3600.0  # nobody compares with a picture that old, and the patient may be another


class FrozenFrames:
    """The frozen frames of all clients, by name; one thread only."""

    def __init__(self) -> None:
        self._sights: dict[str, Sight] = {}

    def freeze(self, sight: Sight, name: str | None) -> str:
        """Keep a sight and return its name; raises SonoEdgeError when the name is in use or too many are kept."""
        self._expire()
        name = name or str(sight.frame.sequence)
        if name == LIVE:
            raise SonoEdgeError(f"{LIVE!r} is the name of the newest frame: choose another")
        if name in self._sights and self._sights[name] is not sight:
            kept = self._sights[name].frame.sequence
            raise SonoEdgeError(f"{name!r} is frame {kept} already: release it, or choose another name")
        if name not in self._sights and len(self._sights) >= MOST_FRAMES:
            raise SonoEdgeError(
                f"{MOST_FRAMES} frames are frozen, the most there can be: release one of {self._names()}"
            )
        self._sights[name] = sight
        return name

    def release(self, name: str) -> Sight:
        """Let a frame go and return it; raises SonoEdgeError when there is none of that name."""
        sight = self.get(name)
        del self._sights[name]
        return sight

    def get(self, name: str) -> Sight:
        """Return a frozen frame; raises SonoEdgeError when there is none of that name."""
        self._expire()
        if name not in self._sights:
            others = f", or one of {self._names()}" if self._sights else ""
            raise SonoEdgeError(f"there is no frozen frame {name!r}: name {LIVE!r}{others}")
        return self._sights[name]

    def list(self) -> tuple[NamedFrame, ...]:
        """Return the name, number and age of every frozen frame."""
        self._expire()
        return tuple(named(name, sight) for name, sight in self._sights.items())

    def _names(self) -> str:
        return ", ".join(map(repr, self._sights))

    def _expire(self) -> None:
        oldest_ns = time.monotonic_ns() - int(KEPT_S * 1e9)
        for name in [name for name, sight in self._sights.items() if sight.frame.captured_ns < oldest_ns]:
            del self._sights[name]


def named(name: str, sight: Sight) -> NamedFrame:
    """Return the frame's name, number and age now."""
    return NamedFrame(name, sight.frame.sequence, sight.age_ms)
