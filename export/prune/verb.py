"""`sonoedge prune`: a student cut out of a checkpoint, as the recipe's [student] says, without training."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from sonoedge.calibration.pool import phantom_pool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec
from sonoedge.export.corpus import open_corpus
from sonoedge.export.models.saving import TOKENIZER_FILES
from sonoedge.export.prune.card import PrunedStudent
from sonoedge.export.prune.checkpoint import prune_checkpoint, section
from sonoedge.export.recipe import load_recipe


class Pruned(msgspec.Struct, frozen=True):
    """What the verb tells."""

    out: str
    seconds: float
    student: PrunedStudent


def run(checkpoint: Path, recipe: str | None, data: str | None, out: Path, *, as_json: bool) -> None:
    """The verb: prune CHECKPOINT into OUT, a checkpoint of the same format."""
    began = time.monotonic()
    settings = load_recipe(recipe)
    shape = section(settings)
    if data is not None and shape.importance == "weights":
        raise SonoEdgeError(
            f"--data {data} and student.importance = 'weights', which measures nothing: say importance = 'measured' in "
            "the recipe, or leave --data out"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SonoEdgeError(f"{out} exists and is not an empty folder: choose another --out or remove it")
    for name in TOKENIZER_FILES:
        if checkpoint.is_dir() and not (checkpoint / name).is_file():
            raise SonoEdgeError(f"{checkpoint / name} does not exist: copy it from the checkpoint again")
    with TemporaryDirectory(prefix="sonoedge-") as work:
        corpus = None
        if data is not None:
            spec, frames = image_spec(checkpoint), settings.calibration
            label = "render phantoms to measure on"
            pool = (
                phantom_pool(Path(work), frames.frames, first_seed=frames.first_frame_seed, spec=spec, label=label)
                if data == "phantoms"
                else None
            )
            corpus = open_corpus(data, spec, pool)
        student = prune_checkpoint(checkpoint, settings, corpus, out)
    pruned = Pruned(str(out), round(time.monotonic() - began, 1), student)
    if as_json:
        print(msgspec.json.encode(pruned).decode())
        return
    share = student.parameters / student.teacher_parameters
    print(
        f"{out}: a student of {student.parameters:,} parameters, {share:.0%} of its teacher's, chosen by "
        f"{'measured activations' if student.importance == 'measured' else 'weights alone'}; not trained"
    )
