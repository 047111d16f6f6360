"""Progress of long steps, on standard error: a bar on a terminal, one line at the start and at the end elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Reports work done inside a `track` block."""

    def __call__(self, steps: float = 1, note: str = "") -> None:
        """Add `steps` to the work done; `note`, when given, is shown beside the bar (for example the loss)."""


@contextmanager
def track(label: str, total: float | None) -> Iterator[Advance]:
    """Show the progress of the enclosed step, `total` units of work long (None: unknown)."""
    started = time.monotonic()
    outcome = "failed"
    try:
        if sys.stderr.isatty():
            with _bar(label, total) as advance:
                yield advance
        else:
            _line(f"{label} ...")
            yield _ignore
        outcome = "done"
    finally:
        _line(f"{label}: {outcome} in {time.monotonic() - started:.1f} s")


@contextmanager
def _bar(label: str, total: float | None) -> Iterator[Advance]:
    # Imported here so that a scanner that logs to a file never pays for rich.
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeElapsedColumn(),
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.fields[note]}"),
    )
    # A transient bar is replaced by the closing line, so that a terminal and a log end up with the same record.
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total, note="")

        def advance(steps: float = 1, note: str = "") -> None:
            if note:
                progress.update(task, advance=steps, note=note)
            else:
                progress.advance(task, steps)

        yield advance


def _ignore(steps: float = 1, note: str = "") -> None:
    """Drop the report: without a terminal only the start and the end of a step are told."""


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
