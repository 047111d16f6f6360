"""`sonoedge evaluate`: how often a checkpoint or a bundle answers closed questions about fresh phantoms rightly."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from rich.console import Console
from rich.table import Table

from sonoedge.bundle import MANIFEST_FILE, TOKENIZER_FILE, open_bundle
from sonoedge.calibration.pool import phantom_pool
from sonoedge.calibration.scores import ScoredFrames, score_pool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.torch_session import TorchSession
from sonoedge.runtime.sessions.base import Session
from sonoedge.runtime.sessions.choose import Backend, open_session
from sonoedge.runtime.tokens import Tokenizer

FIRST_FRAME_SEED = 9_000_000  # far from the seeds of every recipe: no frame here was trained or calibrated on
CONTEXT = 512
DEFAULT_FRAMES = 500


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


def run(model: Path, data: str, frames: int, as_json: bool, backend: Backend | None = None) -> None:
    """The verb: accuracy by question, by image quality and by lesion size, on `frames` phantoms."""
    if data != "phantoms":
        raise SonoEdgeError(
            f"--data {data!r}: closed questions are scored on phantoms only, whose truth is known: give --data phantoms"
        )
    session, tokenizer = open_model(model, backend)
    with TemporaryDirectory(prefix="sonoedge-") as work:
        pool = phantom_pool(Path(work), frames, first_seed=FIRST_FRAME_SEED, spec=session.image)
        scored = score_pool(session, tokenizer, pool, "score")
    session.close()
    if as_json:
        result = {"frames": frames, "accuracy": scored.accuracy(), "strata": scored.strata()}
        print(msgspec.json.encode(result).decode())
        return
    print_accuracy({"all frames": scored.accuracy(), **scored.strata()}, f"{model.name}: {frames} fresh phantoms")


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
