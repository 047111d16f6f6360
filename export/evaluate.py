"""`sonoedge evaluate`: how well checkpoints and bundles write reports, choose diagnoses and answer questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from rich.console import Console
from rich.table import Table

from sonoedge.bundle import MANIFEST_FILE, TOKENIZER_FILE, open_bundle
from sonoedge.calibration.scores import ScoredFrames
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec, is_random, open_tokenizer
from sonoedge.export.evaluation.evaluate import FIRST_FRAME_SEED, PHANTOMS, Outcome, evaluate
from sonoedge.export.evaluation.page import evaluation_html
from sonoedge.export.evaluation.result import Answer, Evaluation, System
from sonoedge.export.evaluation.tables import print_evaluation
from sonoedge.export.models.loading import load_checkpoint, open_checkpoint
from sonoedge.export.torch_session import TorchSession
from sonoedge.manifest import decode_manifest
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.sessions.choose import Backend, open_session
from sonoedge.runtime.tokens import Tokenizer

__all__ = ["DEFAULT_FRAMES", "FIRST_FRAME_SEED", "open_model", "print_accuracy", "rounded", "run"]

CONTEXT = 4096  # of a checkpoint, tokens; a bundle has its own
DEFAULT_FRAMES = 500
PAGE, DATA = "evaluation.html", "evaluation.json"


def open_model(path: Path, backend: Backend | None = None) -> tuple[Session, Tokenizer]:
    """A session on a bundle or a checkpoint folder, with its tokenizer; raises SonoEdgeError when it is neither.

    backend: what runs a bundle; None is what its device profile names.
    """
    if (path / MANIFEST_FILE).exists():
        return open_session(open_bundle(path), backend), Tokenizer.from_file(path / TOKENIZER_FILE)
    model = load_checkpoint(path)
    tokenizer = open_tokenizer(path, model.config)
    context = min(CONTEXT, model.config.max_position_embeddings)
    return TorchSession(model, image_spec(path), context), tokenizer


def run(
    model: Path,
    data: str,
    frames: int,
    as_json: bool,
    backend: Backend | None = None,
    *,
    against: Sequence[Path] = (),
    out: Path | None = None,
) -> None:
    """The verb: MODEL, and those of `against` beside it, on the same cases; page and all answers go to `out`."""
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SonoEdgeError(f"--out {out} exists and is not an empty folder: choose another, or remove it")
    if data != PHANTOMS and not Path(data).exists():
        raise SonoEdgeError(
            f"--data {data!r} does not exist: name a conversation file (.json), a folder with a folder of pictures for "
            "each class, or phantoms"
        )
    systems = describe([model, *against])  # before any of them answers for hours
    with TemporaryDirectory(prefix="sonoedge-") as work:
        outcome = evaluate(systems, data, frames, lambda path: open_model(path, backend), Path(work))
    if out is not None:
        write(outcome, out)
    found = outcome.evaluation
    if as_json:
        print(msgspec.json.encode(found).decode())
        return
    if isinstance(found.accuracy, dict) and isinstance(found.strata, dict):
        print_accuracy({"all frames": found.accuracy, **found.strata}, f"{model.name}: {frames} fresh phantoms")
    print_evaluation(found)
    if out is not None:
        print(f"{out / PAGE}: tables and worst cases; {out / DATA}: every answer")


class Written(msgspec.Struct, frozen=True):
    """What `evaluation.json` holds: the result, and every answer that it stands on."""

    evaluation: Evaluation
    answers: tuple[Answer, ...]


def write(outcome: Outcome, out: Path) -> None:
    """Write the page and all answers into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    written = Written(outcome.evaluation, outcome.scored.answers)
    (out / DATA).write_bytes(msgspec.json.format(msgspec.json.encode(written), indent=1))
    (out / PAGE).write_text(evaluation_html(outcome.evaluation, outcome.cases), encoding="utf-8")


def describe(paths: Sequence[Path]) -> tuple[System, ...]:
    """Name every model and say what it is; raises SonoEdgeError for a path that is neither checkpoint nor bundle."""
    names = Counter(path.resolve().name for path in paths)
    systems = []
    for number, path in enumerate(paths, 1):
        name = path.resolve().name
        systems.append(System(name if names[name] == 1 else f"{name} ({number})", str(path), _what(path)))
    return tuple(systems)


def _what(path: Path) -> str:
    if (path / MANIFEST_FILE).exists():
        held = decode_manifest((path / MANIFEST_FILE).read_bytes())
        drawn = ", random weights" if held.model.random else ""
        return f"bundle for {held.profile}, {held.model.architecture}, {held.model.parameters:,} parameters{drawn}"
    config, headers = open_checkpoint(path)
    drawn = ", random weights" if is_random(path) else ""
    parameters = sum(header.parameters for header in headers.values())
    return f"checkpoint, {config.architecture}, {parameters:,} parameters{drawn}"


def print_accuracy(rows: dict[str, dict[str, float]], title: str, console: Console | None = None) -> None:
    """A table of fractions, one row a group, one column a question."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    table = Table("", *columns, title=title)
    for label, row in rows.items():
        table.add_row(label, *(f"{row[name]:.1%}" if name in row else "" for name in columns))
    (console or Console()).print(table)


def rounded(scored: ScoredFrames) -> dict[str, float]:
    """The accuracy of a pool to four places, for files."""
    return {name: round(value, 4) for name, value in scored.accuracy().items()}
