"""The teacher's outputs on disk: computed once by all processes, in shards, and read by any number of runs.

A row holds the likeliest tokens and the mass of the others (J. Anshumann et al., "Sparse logit sampling", arXiv
2503.16870, on what goes wrong without the latter), in float16 as everything else: log-probabilities, not logits, whose
rounding would be some hundredths.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sonoedge.errors import SonoEdgeError
from sonoedge.export.distilling.draws import Draws, Pass
from sonoedge.export.distilling.losses import TopK
from sonoedge.export.distilling.taught import Taught, Teaches, Wanted
from sonoedge.export.packing import IGNORE
from sonoedge.progress import track

MANIFEST = "manifest.json"
SHARD = 64  # draws in one file
OPEN_SHARDS = 32
_ENDS = "ends."  # of the rows of each draw
_KINDS = {"embeds": ("embeds",), "answers": ("indices", "hidden.", "router.")}


class TaughtManifest(msgspec.Struct, frozen=True):
    """What the outputs were computed from and for; nothing else is read from them."""

    teacher: str  # hashes of the weights and of the data
    data: str
    seed: int
    turns: str
    draws: int
    context: int
    precision: str
    wanted: Wanted


class TaughtFiles:
    """The recorded teacher."""

    def __init__(self, folder: Path, manifest: TaughtManifest, accelerator: Accelerator) -> None:
        """Raises SonoEdgeError when the folder holds something else, naming the first difference."""
        self._folder, self._manifest, self._accelerator = folder, manifest, accelerator
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._opened)
        path = folder / MANIFEST
        if path.exists():
            self._check(path)
        elif folder.exists() and any(folder.iterdir()):
            raise SonoEdgeError(f"{folder} is not empty and holds no {MANIFEST}: choose another --taught")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            partial = folder / f".{MANIFEST}.{os.getpid()}"
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
            partial.replace(path)
        accelerator.wait_for_everyone()

    def complete(self) -> bool:
        """Whether every shard is there."""
        return all(self._path(shard).exists() for shard in self._shards())

    def record(self, draws: Draws, teacher: Teaches, most: int) -> None:
        """Compute the shards that are missing, this process its share; at most `most` samples go through at once.

        Several runs may fill one folder at the same time.
        """
        accelerator = self._accelerator
        mine = list(self._shards())[accelerator.process_index :: accelerator.num_processes]
        with track("record the teacher", len(mine)) as advance:
            for shard in mine:
                if not self._path(shard).exists():
                    first = shard * SHARD
                    numbers = range(first, min(first + SHARD, self._manifest.draws))
                    self._write(shard, numbers, draws.passes(numbers, most), teacher)
                advance(1)
        accelerator.wait_for_everyone()

    def taught(self, item: Pass, *, vision_only: bool) -> Taught:
        """Read what was recorded of the samples of a pass."""
        parts = [self._read(number, vision_only) for number in item.numbers]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        logits = None
        if "top" in joined:
            # Rounding moved the sum of the probabilities a little from 1.
            logs = torch.cat([joined["top"], joined["tail"][:, None]], dim=1).log_softmax(dim=1)
            logits = TopK(joined["indices"].long(), logs[:, :-1], logs[:, -1])
        layered = {kind: [name for name in joined if name.startswith(kind)] for kind in ("hidden.", "router.")}
        hidden, router = (tuple(joined[name] for name in sorted(names, key=_layer)) for names in layered.values())
        return Taught(joined["embeds"], logits, hidden, router)

    def _shards(self) -> range:
        return range(-(-self._manifest.draws // SHARD))

    def _path(self, shard: int) -> Path:
        return self._folder / f"taught-{shard:06d}.safetensors"

    def _check(self, path: Path) -> None:
        try:
            found = msgspec.json.decode(path.read_bytes(), type=TaughtManifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SonoEdgeError(f"{path} cannot be read ({error}): remove {self._folder}") from error
        for name in TaughtManifest.__struct_fields__:
            was, wanted = getattr(found, name), getattr(self._manifest, name)
            if was != wanted:
                raise SonoEdgeError(
                    f"{self._folder} holds outputs for {name} = {_told(was)} and this run has {_told(wanted)}: remove "
                    "it, or choose another --taught"
                )

    def _write(self, shard: int, numbers: Sequence[int], passes: Sequence[Pass], teacher: Teaches) -> None:
        by_draw = {
            number: rows
            for item in passes
            for number, rows in zip(item.numbers, _split(item, teacher.taught(item, vision_only=False)), strict=True)
        }
        ordered = [by_draw[number] for number in numbers]
        tensors = {name: torch.cat([rows[name] for rows in ordered]) for name in ordered[0]}
        for kind, names in _KINDS.items():
            if found := next((name for name in tensors if name.startswith(names)), None):
                ends = accumulate((rows[found].shape[0] for rows in ordered), initial=0)
                tensors[f"{_ENDS}{kind}"] = torch.tensor(list(ends))
        path = self._path(shard)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            save_file(tensors, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _opened(self, shard: int) -> Any:
        path = self._path(shard)
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise SonoEdgeError(f"{path} is damaged ({error}): remove it, so that it is recorded again") from error

    def _read(self, number: int, vision_only: bool) -> dict[str, Tensor]:
        shard, place = divmod(number, SHARD)
        file = self._shard(shard)
        names = ["embeds"] if vision_only else [name for name in file.keys() if not name.startswith(_ENDS)]  # noqa: SIM118
        rows: dict[str, Tensor] = {}
        for name in names:
            kind = "embeds" if name == "embeds" else "answers"
            first, last = file.get_slice(f"{_ENDS}{kind}")[place : place + 2].tolist()
            tensor = file.get_slice(name)[first:last]
            rows[name] = tensor.float() if tensor.is_floating_point() else tensor
        return rows


def _split(item: Pass, taught: Taught) -> Iterator[dict[str, Tensor]]:
    """What is written of each sample of a pass."""
    samples = item.batch.packed.labels.shape[0]
    answers = (item.batch.packed.labels != IGNORE).sum(1).tolist()
    columns: dict[str, Sequence[Tensor]] = {"embeds": taught.embeds.half().cpu().chunk(samples)}
    rows: dict[str, Tensor] = {f"hidden.{i}": tensor.half() for i, tensor in enumerate(taught.hidden)}
    rows |= {f"router.{i}": tensor.half() for i, tensor in enumerate(taught.router)}
    if isinstance(taught.logits, TopK):
        top = taught.logits
        rows |= {"indices": top.indices.int(), "top": top.log_probabilities.half(), "tail": top.log_tail.half()}
    columns |= {name: tensor.cpu().split(answers) for name, tensor in rows.items()}
    for index in range(samples):
        yield {name: parts[index] for name, parts in columns.items()}


def _layer(name: str) -> int:
    return int(name.partition(".")[2])


def _told(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 80 else f"{text[:77]}..."
