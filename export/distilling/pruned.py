"""A student that only its teacher's folder can give: trimmed in vocabulary, by measurement, merged or for a device."""

from __future__ import annotations

from pathlib import Path

import msgspec
from accelerate import Accelerator

from sonoedge.export.checkpoint_files import open_tokenizer
from sonoedge.export.corpus import Corpus
from sonoedge.export.distilling.hashes import files_hash
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.prune.card import TOKEN_IDS_FILE
from sonoedge.export.prune.checkpoint import prune_checkpoint
from sonoedge.export.recipe import Recipe
from sonoedge.export.student import with_vocabulary
from sonoedge.runtime.tokens import Tokenizer

STUDENT = "pruned-student"  # in the training folder, as long as a run may go on


class PrunedStart(msgspec.Struct, frozen=True):
    """Where training begins: the student as `sonoedge prune` cuts it, and the teacher in the student's vocabulary."""

    folder: Path
    student: EchoVLM
    teacher: EchoVLM
    tokenizer: Tokenizer


def prune_to_start(
    checkpoint: Path,
    teacher: EchoVLM,
    recipe: Recipe,
    corpus: Corpus,
    training: Path,
    accelerator: Accelerator,
    *,
    identity: str,
) -> PrunedStart:
    """Prune `checkpoint`, which `teacher` was loaded from, once for all processes and for a run that goes on later.

    training: folder of the run. identity: hash of what the student depends on. Raises as `prune_checkpoint` does.
    """
    folder = training / f"{STUDENT}-{identity[:16]}"
    with accelerator.main_process_first():
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            measures = recipe.student is not None and recipe.student.importance == "measured"
            prune_checkpoint(checkpoint, recipe, corpus if measures else None, folder)
    student = load_checkpoint(folder)
    tokens = folder / TOKEN_IDS_FILE
    if tokens.exists():
        ids = msgspec.json.decode(tokens.read_bytes(), type=list[int])
        teacher = with_vocabulary(teacher, student.config, ids)
    return PrunedStart(folder, student, teacher, open_tokenizer(folder, student.config))


def hash_in_vocabulary(teacher: str, start: PrunedStart) -> str:
    """The hash of a teacher, another one where it speaks a trimmed vocabulary."""
    tokens = start.folder / TOKEN_IDS_FILE
    return files_hash([tokens], teacher) if tokens.exists() else teacher
