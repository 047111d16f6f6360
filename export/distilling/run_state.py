"""The state of a training run on disk: a kill at any moment leaves the last whole one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
from accelerate import Accelerator
from safetensors import SafetensorError

from sonoedge.errors import SonoEdgeError

IDENTITY, POSITION, PARTIAL = "run.json", "position.json", ".state.partial"


class Identity(msgspec.Struct, frozen=True):
    """What a run is made of: another recipe, teacher or data is another run."""

    recipe: str  # hashes
    teacher: str
    data: str


class Position(msgspec.Struct, frozen=True):
    """How far a run is, beside what `accelerate` saves: model, projections, optimiser and random states."""

    step: int  # the next one
    load: list[list[float]]  # of the experts in the step before


class RunState:
    """States in a folder that all processes see, each in a folder of its own, named by its step."""

    def __init__(self, folder: Path, identity: Identity, accelerator: Accelerator) -> None:
        """Raises SonoEdgeError when the folder holds another run."""
        self.folder, self._accelerator = folder, accelerator
        told = folder / IDENTITY
        if told.exists():
            try:
                found = msgspec.json.decode(told.read_bytes(), type=Identity)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise SonoEdgeError(f"{told} cannot be read ({error}): remove {folder} to begin anew") from error
            for name in Identity.__struct_fields__:
                if getattr(found, name) != getattr(identity, name):
                    raise SonoEdgeError(
                        f"{folder} holds a run with another {name}: remove it to begin anew, or choose another --out"
                    )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not told.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = told.with_suffix(".partial")
            partial.write_bytes(msgspec.json.encode(identity))
            partial.replace(told)

    def restore(self) -> Position | None:
        """Load the last state into what `accelerate` prepared; None where there is none. SonoEdgeError if damaged."""
        states = self._states()
        if not states:
            return None
        last = states[-1]
        try:
            position = msgspec.json.decode((last / POSITION).read_bytes(), type=Position)
            self._accelerator.load_state(str(last))
        except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, msgspec.DecodeError) as error:
            raise SonoEdgeError(f"{last} is damaged ({error}): remove it to go on from an earlier step") from error
        return position

    def save(self, position: Position) -> None:
        """Write a state, then forget the one before."""
        partial = self.folder / PARTIAL
        whole = self.folder / f"state-{position.step:08d}"
        main = self._accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        self._accelerator.wait_for_everyone()
        self._accelerator.save_state(str(partial))
        self._accelerator.wait_for_everyone()
        if main:
            (partial / POSITION).write_bytes(msgspec.json.encode(position))
            for path in partial.rglob("*"):
                _sync(path)
            earlier = self._states()
            partial.rename(whole)
            _sync(self.folder)
            for state in earlier:
                shutil.rmtree(state)
        self._accelerator.wait_for_everyone()

    def _states(self) -> list[Path]:
        return _states(self.folder)


def forget(folder: Path) -> None:
    """Remove what only a run that goes on needs."""
    for path in (*_states(folder), folder / PARTIAL):
        shutil.rmtree(path, ignore_errors=True)
    (folder / IDENTITY).unlink(missing_ok=True)


def _states(folder: Path) -> list[Path]:
    return sorted(folder.glob("state-*"))


def _sync(path: Path) -> None:
    """Bring a file or folder to the disk itself, so that a power cut keeps what a rename promised."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
