"""A random EchoVLM becomes an INT8 bundle: how long it takes beside copying it, how much memory, and does it answer.

python -m benchmarks.full_size [--config echovlm-7b] [--recipe weight-only] [--work DIR]

Everything is measured in one run on one machine, and the last line is JSON. The full size needs 60 GB of disk and about
half an hour; `--config echovlm-500m` tries it in minutes.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated

import msgspec
import typer

from benchmarks.answer_once import Answered
from benchmarks.memory import CommandFailedError, Measured, run_measured
from benchmarks.numpy_baseline import convert_seconds, copy_seconds
from sonoedge.export.checkpoint_files import is_random
from sonoedge.export.models.loading import open_checkpoint

PROFILES = {"x86_64": "cpu-x86-64", "aarch64": "cpu-aarch64"}
SONOEDGE = (sys.executable, "-c", "import sys; from sonoedge.cli import main; sys.exit(main())")


class FullSize(msgspec.Struct, frozen=True):
    """What was measured; the memory is what no file backs, of all processes of a step together."""

    checkpoint: str
    random: bool
    recipe: str
    machine: str
    parameters: int
    checkpoint_bytes: int
    make_s: float | None  # None when the checkpoint was there
    make_peak_anonymous_bytes: int | None
    copy_s: float
    convert_s: float  # numpy alone: bfloat16 to float32 to int8
    build_s: float
    build_ratio: float  # build_s / (copy_s + convert_s)
    build_peak_anonymous_bytes: int
    bundle_bytes: int
    answer: Answered
    answer_peak_anonymous_bytes: int


def main(
    config: Annotated[str, typer.Option(help="Packaged config, or the path of a config.json.")] = "echovlm-7b",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint that is there already, instead of --config.", show_default=False)
    ] = None,
    recipe: Annotated[str, typer.Option(help="As for `sonoedge build`.")] = "weight-only",
    work: Annotated[Path, typer.Option(help="Folder for what is made on the way; it needs the space.")] = Path(),
    keep: Annotated[bool, typer.Option("--keep", help="Leave the checkpoint and the bundle in it.")] = False,
) -> None:
    """Measure a build of a random checkpoint of any size."""
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix="full-size-", dir=work))
    try:
        result = measure(config, checkpoint, recipe, folder)
    except CommandFailedError as error:
        sys.exit(str(error))
    finally:
        if keep:
            _say(f"kept {folder}")
        else:
            shutil.rmtree(folder)
    print(msgspec.json.encode(result).decode())


def measure(config: str, checkpoint: Path | None, recipe: str, work: Path) -> FullSize:
    """Make what is missing, convert and build it in `work`, and ask the bundle; every step tells how it went."""
    made: Measured | None = None
    if checkpoint is None:
        checkpoint = work / "checkpoint"
        made = _step("make the checkpoint", "make-checkpoint", "--config", config, "--random", "--out", checkpoint)
    _, headers = open_checkpoint(checkpoint)
    size = sum(header.bytes for header in headers.values())
    os.sync()  # what one step leaves in the page cache is not written during the next
    copy_s = copy_seconds(checkpoint, work / "copy")
    _say(f"copy the checkpoint: {copy_s:.1f} s")
    os.sync()
    convert_s = convert_seconds(checkpoint, work / "int8")
    _say(f"convert it with numpy alone: {convert_s:.1f} s")
    (work / "int8").unlink()
    os.sync()
    bundle = work / "bundle"
    profile = PROFILES[platform.machine()]
    built = _step(
        *("build the bundle", "build", checkpoint, "--recipe", recipe, "--profile", profile),
        *("--calibration", "phantoms", "--out", bundle),
    )
    _say("answer a question ...")
    answered = run_measured((sys.executable, "-m", "benchmarks.answer_once", str(bundle)))
    return FullSize(
        checkpoint=config if made is not None else str(checkpoint),
        random=is_random(checkpoint),
        recipe=recipe,
        machine=f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        parameters=sum(header.parameters for header in headers.values()),
        checkpoint_bytes=size,
        make_s=None if made is None else made.seconds,
        make_peak_anonymous_bytes=None if made is None else made.peak_anonymous_bytes,
        copy_s=round(copy_s, 1),
        convert_s=round(convert_s, 1),
        build_s=built.seconds,
        build_ratio=round(built.seconds / (copy_s + convert_s), 2),
        build_peak_anonymous_bytes=built.peak_anonymous_bytes,
        bundle_bytes=sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()),
        answer=msgspec.json.decode(answered.last_line, type=Answered),
        answer_peak_anonymous_bytes=answered.peak_anonymous_bytes,
    )


def _step(label: str, *arguments: str | Path) -> Measured:
    """Run one verb of the command line in a process of its own."""
    _say(f"{label} ...")
    measured = run_measured((*SONOEDGE, *map(str, arguments), "--json"))
    _say(f"{label}: {measured.seconds:.1f} s, {measured.peak_anonymous_bytes / 2**30:.2f} GiB at the peak")
    return measured


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    typer.run(main)
