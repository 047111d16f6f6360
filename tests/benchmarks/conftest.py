"""The benches are run from the top-level folder, so that is where tests find them."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test import `benchmarks`."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent.parent)
