"""Golden cases: the float model's logits, recorded block by block, and how far built graphs are from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from sonoedge.bundle import BundleWriter
from sonoedge.calibration.pool import PhantomPool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec
from sonoedge.export.corpus import PhantomCorpus
from sonoedge.export.golden_cases import LEAST_BOUND, MARGIN, UNMEASURED_BOUND, Recorded, record_golden
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.recipe import Limits
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.golden import GoldenCase, load_case
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.tokens import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = Limits(context=640, golden_cases=2)
Record = Callable[..., tuple[Recorded, dict[str, GoldenCase]]]


class Off:
    """A session whose logits are off by a factor."""

    def __init__(self, session: TorchSession, factor: float) -> None:
        self._session, self._factor = session, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def extend(self, *arguments: Any, **named: Any) -> Any:
        return self._session.extend(*arguments, **named) * np.float32(self._factor)


@pytest.fixture
def session(tiny_checkpoint: Path) -> TorchSession:
    return TorchSession(load_checkpoint(tiny_checkpoint), image_spec(tiny_checkpoint), 640)


@pytest.fixture
def record(tiny_checkpoint: Path, tiny_tokenizer: Tokenizer, frames: PhantomPool, tmp_path: Path) -> Iterator[Record]:
    spec = image_spec(tiny_checkpoint)
    with BundleWriter(tmp_path / "bundle", tmp_path / "work") as writer:

        def call(session: Session | None, limits: Limits = LIMITS) -> tuple[Recorded, dict[str, GoldenCase]]:
            corpus = PhantomCorpus(frames, spec)
            found = record_golden(tiny_checkpoint, session, corpus, tiny_tokenizer, spec, limits, writer)
            files = (tmp_path / "work" / "golden").iterdir()
            return found, {path.name: load_case(path) for path in sorted(files)}

        yield call


def test_the_float_model_itself_has_no_error(record: Record, session: TorchSession) -> None:
    found, cases = record(session)
    assert found.error is not None
    assert 0 <= found.error < 1e-5
    assert found.bound == LEAST_BOUND
    assert list(cases) == ["0.npz", "1.npz"]
    for case in cases.values():
        assert case.error(session) < 1e-5
        assert int((case.ids == session.spec.image_token_id).sum()) * 4 == int(np.prod(case.grid))
        assert len(case.ids) < 640


def test_the_bound_leaves_room_over_the_worst_case(record: Record, session: TorchSession) -> None:
    found, _ = record(Off(session, 0.75))
    assert found.error == pytest.approx(0.25, abs=1e-5)
    assert found.bound == pytest.approx(MARGIN * 0.25, abs=1e-4)


def test_graphs_that_do_not_fit_are_held_to_a_wide_bound(record: Record) -> None:
    found, cases = record(None)
    assert found == Recorded(None, UNMEASURED_BOUND)
    assert UNMEASURED_BOUND < 1  # what garbage is off by
    assert len(cases) == 2


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(record: Record, session: TorchSession, factor: float) -> None:
    with pytest.raises(SonoEdgeError, match="golden/0: the built graphs give numbers that are not finite"):
        record(Off(session, factor))


def test_no_more_cases_than_samples(record: Record, frames: PhantomPool) -> None:
    _, cases = record(None, msgspec.structs.replace(LIMITS, golden_cases=99))
    assert len(cases) == len(frames)
