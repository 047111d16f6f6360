"""Two processes against one: `accelerate launch` gives the same losses, one voice, and an end when a process dies."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from sonoedge.export.models.loading import load_checkpoint


def until(condition: Callable[[], bool], process: Any, seconds: float = 120) -> None:
    """Wait for a condition, while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_processes_train_as_one(
    tiny_checkpoint: Path, cases: Path, small_recipe: Callable[..., Path], runs: Any, tmp_path: Path
) -> None:
    recipe = small_recipe()
    arguments = (tiny_checkpoint, "--recipe", recipe, "--data", cases, "--json", "--out")
    two = runs.start(*arguments, tmp_path / "two", processes=2)
    printed, told = two.communicate(timeout=200)
    assert two.returncode == 0, told
    one = runs.start(*arguments, tmp_path / "one")
    assert one.wait(200) == 0, one.stderr.read()
    assert [msgspec.json.decode(line)["out"] for line in printed.splitlines()] == [str(tmp_path / "two")]
    assert told.count("distil the student: done") == 1
    logs = [runs.steps(tmp_path / name) for name in ("one", "two")]
    assert len(logs[0]) == 6
    assert set(logs[0][-1].losses) == {"embeds", "answers", "logits", "hidden", "router", "balance"}
    found = runs.farthest(*logs)
    print(f"largest difference of a loss between one process and two: {found:.2g}")
    assert found < 1e-4
    weights = [load_checkpoint(tmp_path / name).state_dict() for name in ("one", "two")]
    assert max(float((tensor - weights[1][key]).abs().max()) for key, tensor in weights[0].items()) < 1e-3


def test_a_refusal_is_told_once(
    tiny_checkpoint: Path, cases: Path, small_recipe: Callable[..., Path], runs: Any, tmp_path: Path
) -> None:
    ran = runs.start(
        tiny_checkpoint, "--recipe", small_recipe(batch=1), "--data", cases, "--out", tmp_path / "out", processes=2
    )
    _, told = ran.communicate(timeout=200)
    assert ran.returncode != 0
    assert told.count("sonoedge: error:") == 1
    assert "distill.batch = 1 and there are 2 processes: raise it" in told


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_the_run_and_keeps_its_state(
    tiny_checkpoint: Path, cases: Path, small_recipe: Callable[..., Path], runs: Any, tmp_path: Path, rank: int
) -> None:
    arguments = (tiny_checkpoint, "--recipe", small_recipe(steps=4_000), "--data", cases, "--out", tmp_path / "out")
    ran = runs.start(*arguments, processes=2)
    training = tmp_path / "out.training"
    until(lambda: any(training.glob("state-*")), ran)
    workers = [p for p in psutil.Process(ran.pid).children(recursive=True) if "distill" in p.cmdline()]
    ranked = {worker.environ()["RANK"]: worker for worker in workers}
    began = time.monotonic()
    os.kill(ranked[str(rank)].pid, signal.SIGKILL)
    _, told = ran.communicate(timeout=100)
    print(f"ended {time.monotonic() - began:.1f} s after the kill")
    assert ran.returncode != 0
    assert told.count("sonoedge: error:") == 1
    assert "a process of this run died, so all end: what was saved last is kept" in told
    assert any(training.glob("state-*"))
    assert not (tmp_path / "out").exists()
