"""The bench of the expert kernels without a GPU: its check runs under the interpreter, its figures are as they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from sonoedge.export.plugins.dispatch import DECODE, PREFILL, Experts

SMALL = Experts(experts=3, chosen=2, hidden=80, inner=48, norm_topk_prob=True, block_rows=16)


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test import `benchmarks`."""
    monkeypatch.syspath_prepend(Path(__file__).parents[3])


@pytest.mark.parametrize("activation", ["float16", "bfloat16", "float32"])
def test_every_tile_passes_the_check(interpret: Any, activation: Any) -> None:
    from benchmarks.expert_check import check

    with interpret.launches():
        found = check(SMALL, (1, 20), activation, "cpu")
    print(f"{found.launches} results, largest error {found.largest_error:.1e}")
    assert found.launches > 20
    assert found.steps_off == 0  # the interpreter's exp is the oracle's


def test_the_check_refuses_what_is_wrong() -> None:
    from benchmarks.expert_check import WrongResultError, compare

    ones = np.ones(4, np.float32)
    assert compare("here", ones, ones, 0.01) == (0, 0.0, 0.0)
    wrong = [(ones * np.float32("nan"), ones), (ones * 2, ones), (np.ones(4, np.int32), np.zeros(4, np.int32))]
    wrong += [(np.full(4, 5, np.int8), np.full(4, 3, np.int8)), (np.full(4, 5, np.int8), np.full(4, 4, np.int8))]
    for found, expected in wrong:
        with pytest.raises(WrongResultError, match="here"):
            compare("here", found, expected, 0.01)


def test_rivals_compute_the_same() -> None:
    from benchmarks.expert_layers import random_inputs, random_layer
    from benchmarks.expert_rivals import all_experts, bfloat16_weights, loop_over_experts

    layer = random_layer(SMALL, 0, "cpu")
    inputs = random_inputs(SMALL, 9, "float32", 0, "cpu")
    weights = {name: value.float() for name, value in bfloat16_weights(layer).items()}
    loop = loop_over_experts(inputs["x"], inputs["logits"], weights, SMALL)
    dense = all_experts(inputs["x"], inputs["logits"], weights, SMALL)
    torch.testing.assert_close(loop, dense, rtol=1e-4, atol=1e-5)
    # Activations keep their size, so that what is measured is no zeros and no infinities.
    assert 0.05 < loop.std() < 5


def test_figures() -> None:
    from benchmarks.expert_kernels import ECHOVLM, layers_that_fit, operations, touched_bytes

    lone = {"logits": torch.tensor([[3.0, 2.0, 1.0, 0.0]] * 5)}
    every = {"logits": torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])}
    expert = 3 * 3584 * 1408 + 4 * (2 * 1408 + 3584)
    assert touched_bytes(ECHOVLM, lone) == 2 * expert
    assert touched_bytes(ECHOVLM, every) == 4 * expert
    assert operations(ECHOVLM, 1024) == 1024 * 2 * 2 * 3 * 3584 * 1408
    assert layers_that_fit(ECHOVLM, 80 << 30) == 28
    larger = msgspec.structs.replace(ECHOVLM, hidden=8 * 3584, inner=8 * 1408)
    assert layers_that_fit(larger, 80 << 30) == 13
    assert layers_that_fit(larger, 1 << 30) == 2


@pytest.mark.parametrize("tokens", [1, 64])
def test_tuning_takes_the_quickest_tile(interpret: Any, tokens: int) -> None:
    from benchmarks.expert_layers import kernels_for, outputs, random_inputs, random_layer, tuned

    kernels = kernels_for(tokens)
    assert kernels == (DECODE if tokens == 1 else PREFILL)
    layer = {**random_layer(SMALL, 0, "cpu"), **random_inputs(SMALL, tokens, "float16", 0, "cpu")}
    layer |= outputs(kernels, SMALL, tokens, "float16", "cpu")
    times = iter(range(100, 0, -1))  # each launch quicker than the one before

    def measure(work: Any) -> float:
        work()
        return float(next(times))

    from sonoedge.export.plugins.dispatch import tiles

    with interpret.launches():
        found = tuned(kernels, SMALL, tokens, [layer], measure)
    assert torch.isfinite(layer["y"].float()).all()
    for operator, tile in found.tiles.items():
        assert tile == tiles(operator, SMALL, tokens)[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import typer
    from benchmarks import expert_kernels

    with pytest.raises(typer.Exit) as ended:
        expert_kernels.main("float16", 1)
    assert ended.value.exit_code == 2
    assert capsys.readouterr().out == (
        "This machine has no CUDA GPU that torch can use: run the bench of the expert kernels where one is.\n"
    )
    with pytest.raises(typer.BadParameter, match="float8: choose one of"):
        expert_kernels.main("float8", 1)


def test_the_report_is_a_line_of_json_and_a_table() -> None:
    from benchmarks.expert_check import Checked
    from benchmarks.expert_kernels import Passes, Report, table

    row = Passes(
        hidden=3584, inner=1408, tokens=2, block_rows=None, layers=28, ms=0.0123, share=0.61, gb_s=2000.0, tops=None,
        operators_ms={"ExpertUpDecode": 0.01}, tiles={"ExpertUpDecode": "matrix16x512"}, loop_bfloat16=3.5,
        dense_bfloat16=1.25, dense_int8_products=None,
    )  # fmt: skip
    report = Report(
        "expert_kernels", "a GPU", "2", "3", "float16", 3000.0, 1500.0, Checked(9, 1, 1e-5, 1e-3), (row,), ()
    )
    assert table(report).splitlines()[1].split() == ["3584", "2", "0.0123", "61.0%", "3.50", "1.25", "matrix16x512"]
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report
