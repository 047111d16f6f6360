"""A run that is killed goes on to the losses and weights of the unbroken run; a state that does not fit is refused."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def distil_here(tiny_checkpoint: Path, cases: Path, sonoedge: Any) -> Callable[..., Any]:
    """Run the verb in this process."""

    def run(recipe: Path, out: Path, *more: object) -> Any:
        return sonoedge("distill", tiny_checkpoint, "--recipe", recipe, "--data", cases, "--out", out, *more)

    return run


def test_a_run_killed_at_a_random_step_goes_on_to_the_same_losses(
    tiny_checkpoint: Path, cases: Path, small_recipe: Callable[..., Path], distil_here: Callable[..., Any], runs: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    steps = 60
    recipe = small_recipe(steps=steps, save_every_steps=3)
    assert distil_here(recipe, tmp_path / "whole").status == 0
    kill_at = int(np.random.default_rng().integers(4, steps - 20))
    print(f"killed after step {kill_at}")
    ran = runs.start(tiny_checkpoint, "--recipe", recipe, "--data", cases, "--out", tmp_path / "broken")
    log = tmp_path / "broken.training" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and len(log.read_bytes().splitlines()) > kill_at):
        assert ran.poll() is None, ran.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    ran.send_signal(signal.SIGKILL)
    assert ran.wait(30) == -signal.SIGKILL
    assert not (tmp_path / "broken").exists()
    done = len(runs.steps(tmp_path / "broken"))
    assert kill_at <= done < steps
    with log.open("ab") as file:
        file.write(b'{"step": 99, "lear')  # a line that the kill cut off
    again = distil_here(recipe, tmp_path / "broken")
    assert again.status == 0, again.err
    assert runs.steps(tmp_path / "broken") == runs.steps(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "broken")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert sorted(path.name for path in log.parent.iterdir()) == ["curves.html", "log.jsonl"]


@pytest.fixture
def interrupted(
    small_recipe: Callable[..., Path], distil_here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The folder of a run that ended after its second state."""
    from sonoedge.export.distilling.training import Trainer

    step = Trainer._step

    def failing(self: Trainer, number: int, *arguments: Any) -> dict[str, float]:
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, *arguments)

    monkeypatch.setattr(Trainer, "_step", failing)
    assert distil_here(small_recipe(), tmp_path / "out").status == 130
    monkeypatch.setattr(Trainer, "_step", step)
    return tmp_path / "out.training"


def test_the_last_whole_state_counts(
    interrupted: Path, small_recipe: Callable[..., Path], distil_here: Callable[..., Any], tmp_path: Path
) -> None:
    assert [path.name for path in interrupted.glob("*state*")] == ["state-00000004"]
    (interrupted / ".state.partial").mkdir()
    (interrupted / ".state.partial" / "model.safetensors").write_bytes(b"half")
    assert distil_here(small_recipe(), tmp_path / "out").status == 0


def test_another_recipe_does_not_go_on(
    interrupted: Path, small_recipe: Callable[..., Path], distil_here: Callable[..., Any], tmp_path: Path
) -> None:
    ran = distil_here(small_recipe("other.toml", learning_rate=1e-3), tmp_path / "out")
    assert ran.status == 2
    assert "out.training holds a run with another recipe: remove it to begin anew" in ran.err
    assert (interrupted / "state-00000004").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "position.json"])
def test_a_damaged_state_is_named(
    interrupted: Path, small_recipe: Callable[..., Path], distil_here: Callable[..., Any], tmp_path: Path, file: str
) -> None:
    path = interrupted / "state-00000004" / file
    path.write_bytes(path.read_bytes()[:20])
    ran = distil_here(small_recipe(), tmp_path / "out")
    assert ran.status == 2
    assert "state-00000004 is damaged" in ran.err
