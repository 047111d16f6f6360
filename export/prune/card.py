"""What a pruned checkpoint says of itself: sizes before and after, what stayed, and how that was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

RECORD_FILE = "student.json"
TOKEN_IDS_FILE = (
    "token_ids.json"  # the teacher's id of each token of the student; only where the vocabulary was trimmed
)
CARD_FILE = "README.md"


class PrunedStudent(msgspec.Struct, frozen=True):
    """How a student was cut; indices are the teacher's."""

    teacher: str
    teacher_parameters: int
    parameters: int
    bytes: int  # of the weights
    importance: Literal["measured", "weights"]
    frames: int  # that importance was measured on
    tokens: int
    teacher_sizes: dict[str, int]
    sizes: dict[str, int]
    layers: tuple[int, ...]
    vision_layers: tuple[int, ...]
    influence: tuple[float, ...]  # of each layer of the teacher; empty where not measured
    vision_influence: tuple[float, ...]
    experts: dict[str, tuple[int, ...]]  # by mixture; empty where all stay
    expert_method: Literal["drop", "merge"] | None  # None where all stay
    languages: tuple[str, ...]  # empty where the vocabulary is the teacher's
    recipe_sha256: str
    random: bool  # whether the teacher's weights were drawn at random


def write_card(student: PrunedStudent, token_ids: tuple[int, ...] | None, folder: Path) -> None:
    """Write the record, the card and, where tokens went, the teacher's ids of those that stayed."""
    (folder / RECORD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(student), indent=2) + b"\n")
    if token_ids is not None:
        (folder / TOKEN_IDS_FILE).write_bytes(msgspec.json.encode(token_ids) + b"\n")
    (folder / CARD_FILE).write_text(_card(student), encoding="utf-8")


def _card(student: PrunedStudent) -> str:
    rows = [f"| {key} | {student.teacher_sizes[key]:,} | {size:,} |" for key, size in student.sizes.items()]
    rows.append(f"| parameters | {student.teacher_parameters:,} | {student.parameters:,} |")
    chosen = (
        f"by the activations of {student.frames} frames, {student.tokens:,} tokens, in the teacher"
        if student.importance == "measured"
        else "by the sizes of weights alone, nothing was measured; layers are evenly spread"
    )
    experts = f"\nExperts: {student.expert_method}, by measured routing." if student.expert_method else ""
    languages = f"\nVocabulary: trimmed to {', '.join(student.languages)}." if student.languages else ""
    drawn = "\nThe teacher's weights were drawn at random: this is for benches." if student.random else ""
    return f"""# A student cut out of {student.teacher}

Pruned, not trained: what it answers means nothing before `sonoedge distill` or other training, and an evaluation.

| size | teacher | student |
|---|---|---|
{chr(10).join(rows)}

What stayed was chosen {chosen}.
Decoder layers: {_listed(student.layers)}. Vision blocks: {_listed(student.vision_layers)}.{experts}{languages}{drawn}
`{RECORD_FILE}` holds the same in full.
"""


def _listed(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices))
