"""Rounds, ratios and the reports of `decode` and `prefill`, on contenders that the smallest bundle and PyTorch are."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sonoedge.export.recipe import load_recipe
from sonoedge.export.scheme import Scheme

ROOT = Path(__file__).parent.parent.parent


def test_rounds_rotate_and_the_first_is_thrown_away() -> None:
    from benchmarks.contenders import interleave, ratio, summarize

    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    found = interleave({name: partial(measure, name) for name in "abc"}, rounds=2)
    assert "".join(calls) == "abcbcacab"
    assert found == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}
    # A disturbance that slows one whole round leaves the ratio alone; a median of each alone would not.
    assert ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.5]) == 2.0
    assert summarize([3.0, 1.0, 2.0]) == type(summarize([1.0]))(2.0, 1.0, 3.0)


def test_a_peer_that_cannot_be_installed_is_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import ExitStack

    from benchmarks import contenders, environments

    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    no_tool = environments.Peer("one", "benchmarks.peers.one", ("package",), tools=("no-such-compiler",))
    no_package = environments.Peer("two", "benchmarks.peers.two", (str(tmp_path / "no-such-package"),))
    with ExitStack() as stack:
        empty = msgspec.defstruct("Empty", [])()
        running, skipped = contenders.start({"one": (no_tool, empty), "two": (no_package, empty)}, 1, stack)
    assert running == {}
    assert skipped["one"] == "no-such-compiler must be installed to build package"
    assert "pip could not install it: " in skipped["two"]


@pytest.fixture
def without_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that need an environment of their own are refused."""
    from benchmarks.peers import llama_cpp, onnxruntime_genai

    for module in (llama_cpp, onnxruntime_genai):
        refused = msgspec.structs.replace(module.PEER, packages=("never-installed",), tools=("no-such-compiler",))
        monkeypatch.setattr(module, "PEER", refused)


def test_decode_reports_the_bundle_beside_pytorch(
    tiny: Any, without_peers: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import decode
    from benchmarks.bandwidth import Readers

    monkeypatch.setattr(decode, "Readers", lambda threads: Readers(threads, buffer_bytes=1 << 24))
    decode.main(config=str(tiny.checkpoint / "config.json"), bundle=tiny.bundle, rounds=2, threads=1)
    report = msgspec.json.decode(capfd.readouterr().out.splitlines()[-1], type=decode.Report)
    assert set(report.peers) == {"PyTorch float32", "PyTorch bfloat16"}
    assert set(report.skipped) == {"llama.cpp Q8_0", "onnxruntime-genai INT8"}
    assert report.gb_s == pytest.approx(report.tokens_s.median * report.touched_bytes / 1e9, abs=0.01)
    assert report.bandwidth_fraction == pytest.approx(report.gb_s / report.bandwidth.median_gb_s, abs=0.01)
    for measured in report.peers.values():
        quickest = report.tokens_s.largest / measured.tokens_s.least
        assert report.tokens_s.least / measured.tokens_s.largest - 0.01 <= measured.ratio <= quickest + 0.01


def test_prefill_reports_the_bundle_beside_its_float_graphs(
    tiny: Any, without_peers: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import prefill

    monkeypatch.setattr(prefill, "checkpoint", lambda config: tiny.checkpoint)
    monkeypatch.setattr(prefill, "made_bundle", lambda made, recipe: tiny.bundle)
    prefill.main(config=str(tiny.checkpoint / "config.json"), bundle=tiny.bundle, rounds=2, threads=1)
    report = msgspec.json.decode(capfd.readouterr().out.splitlines()[-1], type=prefill.Report)
    assert set(report.peers) == {"ONNX Runtime float32"}
    assert set(report.skipped) == {"llama.cpp Q8_0"}
    assert 0 < report.vision_ms.least <= report.vision_ms.median
    assert report.vision_ratio > 0


def test_a_contender_that_fails_ends_the_comparison(tmp_path: Path) -> None:
    """Its own words are on standard error, and no number is made up."""
    command = [sys.executable, "-m", "benchmarks.peers.bundle", "--bundle", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "is not a bundle" in done.stderr
    assert "ContenderFailedError: SonoEdge ended with status 1" in done.stderr
    assert done.stdout == ""


def test_the_recipes_differ_from_the_packaged_one_in_calibration_alone() -> None:
    from benchmarks.material import FLOAT_RECIPE, INT8_RECIPE

    assert load_recipe(INT8_RECIPE).quantization == load_recipe("w8a8").quantization
    assert load_recipe(FLOAT_RECIPE).quantization.default is Scheme.FLOAT
