"""ONNX Runtime's session for a GPU, on the CPU: the cache that grows and is cut by masks beside one that is cut."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest

from sonoedge.bundle import Bundle, open_bundle
from sonoedge.errors import SonoEdgeError
from sonoedge.runtime.golden import GoldenCase, check_session, load_case
from sonoedge.runtime.sessions import ort, ort_cuda
from sonoedge.runtime.sessions.ort_cuda import CUDA, OrtCudaSession


@pytest.fixture(scope="module")
def bundle(tiny: Any) -> Bundle:
    return open_bundle(tiny.bundle)


def open_on_cpu(bundle: Bundle) -> OrtCudaSession:
    manifest, graph = bundle.manifest, bundle.graph
    return OrtCudaSession(
        graph("vision", "qdq"), graph("decoder", "qdq"), manifest.image, manifest.decoder, place="cpu"
    )


@pytest.fixture
def session(bundle: Bundle) -> Iterator[OrtCudaSession]:
    opened = open_on_cpu(bundle)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def case(bundle: Bundle) -> GoldenCase:
    return load_case(bundle.path("golden/0.npz"))


def relative(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def text(count: int, seed: int, first: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    ids = np.random.default_rng(seed).integers(0, 400, count)
    return ids, np.tile(np.arange(first, first + count), (3, 1))


def test_the_recorded_outputs_are_repeated(bundle: Bundle, session: OrtCudaSession) -> None:
    other = ort.open_session(bundle, threads=1)
    errors = check_session(bundle, session), check_session(bundle, other)
    print("portable graphs, graphs for the CPU:", errors)
    assert errors[0] == pytest.approx(errors[1], rel=0.3)


def test_rewinding_leaves_columns_that_nobody_sees(bundle: Bundle, session: OrtCudaSession) -> None:
    """After rewinds to the middle, what follows is what a session says that never saw the forgotten tokens."""
    fresh = open_on_cpu(bundle)
    kept, rest = text(9, 1), text(5, 2, 9)
    rows = np.arange(5)
    wanted = (fresh.extend(*kept), fresh.extend(*rest, logits_rows=rows))[1]
    session.extend(*kept)
    for seed in range(3):
        session.extend(*text(4 + seed, 10 + seed, 9))
        session.rewind(9)
        assert session.length == 9
    assert relative(session.extend(*rest, logits_rows=rows), wanted) < 0.02
    session.rewind(9)
    some = np.random.default_rng(0).random((5, 14)) < 0.5
    some &= np.tri(5, 14, 9, dtype=np.bool_)
    some[rows, 9 + rows] = True
    fresh.rewind(9)
    answers = [one.extend(*rest, visible=some, logits_rows=rows) for one in (session, fresh)]
    assert relative(*answers) < 0.02
    assert relative(answers[0], wanted) > 0.02  # the mask is not lost
    fresh.close()


def test_forgotten_columns_are_dropped_when_the_context_is_full(bundle: Bundle, session: OrtCudaSession) -> None:
    context = session.spec.context
    fresh = open_on_cpu(bundle)
    start, rest = text(20, 1), text(context - 20, 2, 20)
    session.extend(*start)
    fresh.extend(*start)
    for seed in range(4):  # columns of 20 + 4 * 200 tokens would not fit
        session.extend(*text(200, seed, 20))
        session.rewind(20)
        widths = {value.shape()[2] for value in session._cache.values()}
        assert len(widths) == 1
        assert widths.pop() <= context
    assert relative(session.extend(*rest), fresh.extend(*rest)) < 0.02
    assert session.length == context
    with pytest.raises(SonoEdgeError, match=rf"{context + 1} tokens do not fit the context of {context}"):
        session.extend(*text(1, 0))
    session.rewind(0)
    assert session._width == 0
    fresh.close()


def test_a_failed_call_changes_nothing(session: OrtCudaSession, case: GoldenCase) -> None:
    ids, positions = text(6, 1)
    session.extend(ids, positions)
    wanted = session.extend(ids, positions)
    session.rewind(6)
    with pytest.raises(SonoEdgeError, match="image tokens but the images give"):
        session.extend(case.ids, case.positions, image_embeds=np.zeros((1, session.spec.hidden), np.float32))
    with pytest.raises(SonoEdgeError, match="holds 6 tokens and cannot be rewound to 7"):
        session.rewind(7)
    assert session.length == 6
    assert relative(session.extend(ids, positions), wanted) < 0.02


def test_a_provider_that_is_missing_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        SonoEdgeError, match=rf"has no {CUDA}: .*pip install 'sonoedge\[gpu\]', or serve with `--backend cpu`"
    ):
        ort_cuda.open_session(bundle)


def test_a_silent_fallback_is_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu on a machine without CUDA loads the graph on the CPU and raises nothing."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    asked: list[Any] = []

    def fallen_back(path: Path, options: Any, providers: list[str]) -> Any:
        asked.extend(providers)
        return types.SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    with pytest.raises(SonoEdgeError, match=rf"asked for {CUDA} and gave CPUExecutionProvider: it needs an NVIDIA GPU"):
        ort_cuda.open_session(bundle)
    assert asked == [CUDA]


@pytest.mark.gpu
def test_on_a_real_gpu(bundle: Bundle) -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("waits for a host with onnxruntime-gpu and a CUDA GPU")
    opened = ort_cuda.open_session(bundle)
    assert check_session(bundle, opened) <= bundle.manifest.golden.bound
    opened.close()
