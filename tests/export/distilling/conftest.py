"""Real runs of `sonoedge distill`, in processes of their own, on the smallest checkpoint and a few cases."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
import pytest

from sonoedge.export.distilling.curves import Step, read_log

DISTILL = {"steps": 6, "vision_steps": 2, "batch": 4, "save_every_steps": 2, "hidden_weight": 0.5, "router_weight": 0.1}


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of one, two and three turns about pictures of two sizes, and about two pictures at once."""
    folder = tmp_path_factory.mktemp("cases")
    entries = []
    for number, sizes in enumerate([[(60, 90)], [(120, 60)], [(60, 90), (120, 60)], [(60, 90)]]):
        names = []
        for index, size in enumerate(sizes):
            names.append(f"{number}_{index}.png")
            cv2.imwrite(str(folder / names[-1]), np.random.default_rng(number).integers(0, 255, (*size, 3), np.uint8))
        turns = []
        for turn in range(1 + number % 3):
            mark = "<image>" * len(names) if turn == 0 else ""
            turns += [
                {"from": "human", "value": f"{mark}Which region?"},
                {"from": "gpt", "value": "liver " * (turn + 1)},
            ]
        entries.append({"id": number, "image": names, "conversations": turns})
    path = folder / "cases.json"
    path.write_bytes(msgspec.json.encode(entries))
    return path


@pytest.fixture
def small_recipe(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe of a few steps: `small_recipe(top_k=8)` changes its [distill]."""

    def write(name: str = "r.toml", **changes: Any) -> Path:
        return write_recipe(tmp_path / name, distill=DISTILL | changes)

    return write


class Runs:
    """Starts runs and ends those that are left."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: object, processes: int = 1, environment: dict[str, str] | None = None) -> Any:
        """Start `sonoedge distill ARGUMENTS` under as many processes."""
        module = ["-m", "sonoedge", "distill", *map(str, arguments)]
        command = [sys.executable, *module]
        if processes > 1:
            launcher = [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                str(processes),
            ]
            rendezvous = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
            address = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
            command = [*launcher, *rendezvous, *address, *module]
        told = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
        started = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=told, start_new_session=True
        )
        self._started.append(started)
        return started

    @staticmethod
    def steps(out: Path) -> list[Step]:
        """The log beside a student."""
        return read_log(out.with_name(f"{out.name}.training") / "log.jsonl")

    @staticmethod
    def farthest(mine: Sequence[Step], theirs: Sequence[Step]) -> float:
        """The largest difference between losses of the same steps, in units of the loss where it is over 1."""
        assert [step.step for step in mine] == [step.step for step in theirs]
        differences = [
            abs(value - other.losses[name]) / max(1.0, abs(value))
            for step, other in zip(mine, theirs, strict=True)
            for name, value in step.losses.items()
        ]
        return max(differences)

    def end(self) -> None:
        """End what still runs."""
        for process in self._started:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture
def runs() -> Iterator[Runs]:
    """Runs of the verb."""
    made = Runs()
    yield made
    made.end()


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
