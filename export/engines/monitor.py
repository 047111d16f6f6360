"""Shows how far a build is, and ends it when asked to."""

from typing import Any

from sonoedge.progress import Advance


class Phases:
    """Nested phases of a build as one share of the whole, 0 to 1, that never goes back."""

    def __init__(self, advance: Advance) -> None:
        self.stopped = False
        self._advance = advance
        self._shown = 0.0
        self._open: dict[str, list[int]] = {}  # name → [steps done, steps], outermost first

    def start(self, name: str, steps: int) -> None:
        """A phase begins inside those that are open."""
        self._open[name] = [0, max(steps, 1)]

    def step(self, name: str, step: int) -> bool:
        """A step is done; False asks the builder to stop."""
        if name in self._open:
            self._open[name][0] = step + 1
            self._show()
        return not self.stopped

    def finish(self, name: str) -> None:
        """A phase is over."""
        self._open.pop(name, None)

    def _show(self) -> None:
        share, width = 0.0, 1.0
        for done, steps in self._open.values():
            width /= steps
            share += min(done, steps) * width
        if share > self._shown:
            self._advance(share - self._shown)
            self._shown = share


def make_monitor(module: Any, phases: Phases) -> Any:
    """A progress monitor of the builder's library over `phases`."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            super().__init__()

        def phase_start(self, phase_name: str, _parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
