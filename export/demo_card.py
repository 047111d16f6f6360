"""The model card of the demo checkpoint: how it was trained, and what it answers rightly on fresh phantoms."""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec

from sonoedge.calibration.scores import ScoredFrames
from sonoedge.export.teacher_recipe import TeacherRecipe

CARD_FILE = "README.md"
EVALUATION_FILE = "evaluation.json"


class Training(msgspec.Struct, frozen=True):
    """What the training run measured of itself."""

    parameters: int
    minutes: float  # wall time in training steps


def write_card(folder: Path, recipe: TeacherRecipe, training: Training, scored: ScoredFrames) -> None:
    """Write the card and the same numbers as JSON beside it."""
    accuracy, strata = scored.accuracy(), scored.strata()
    frames = len(scored.truths)
    numbers = {"frames": frames, "accuracy": accuracy, "strata": strata, "training": training, "recipe": recipe}
    (folder / EVALUATION_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(numbers)) + b"\n")
    columns = list(accuracy)
    rows = "\n".join(
        f"| {label} | " + " | ".join(f"{row[name]:.1%}" if name in row else "" for name in columns) + " |"
        for label, row in {"all frames": accuracy, **strata}.items()
    )
    shape = recipe.model
    (folder / CARD_FILE).write_text(
        f"""# SonoEdge demo teacher

A small EchoVLM ({training.parameters:,} parameters, bfloat16): the architecture of the released model, every part
present, trained on computer-made phantoms only. It exists so that SonoEdge can be tried, tested and benchmarked
without the released weights.

**Intended use**: software demonstration and tests. It has never seen a patient. What it says about a real image means
nothing.

## What it is

| part | size |
|---|---|
| vision tower | {shape.vision_depth} blocks of width {shape.vision_width}, {shape.vision_heads} heads, 2x2 merge |
| decoder | {shape.layers} layers of width {shape.hidden_size}, {shape.heads} heads, {shape.kv_heads} key-value head |
| dense path | width {shape.intermediate_size} |
| experts | {shape.experts} of width {shape.expert_size}, top {shape.experts_per_token} |
| shared expert | width {shape.shared_expert_size} |
| images | up to {shape.image_pixels:,} pixels, {shape.image_pixels // 784} merged tokens |
| vocabulary | {recipe.vocabulary} tokens, byte-level BPE, English and Chinese |

## How it was trained

`make demo-checkpoint`: {recipe.frames:,} phantom frames of seven regions (seeds from {recipe.first_frame_seed:,}), each
also mirrored; first the vision tower alone on what every patch shows ({recipe.vision.steps} steps of
{recipe.vision.batch}), then the whole model on questions in either language and reports, the patch targets kept at
{recipe.joint.dense_weight:g} ({recipe.joint.steps} steps of {recipe.joint.batch}).
Recipe: `export/recipes/demo-teacher.toml`, seed {recipe.seed}. Its training steps took {training.minutes:.0f} minutes
of wall time on two cores of an {platform.machine()} machine that other work shared.

## What it answers rightly

{frames} fresh phantoms (seeds that no training or calibration uses), closed questions scored as the runtime scores
them; kind and side on frames with a lesion. Small lesions have a radius under 18 pixels at 224.

| frames | {" | ".join(columns)} |
|---|{"---|" * len(columns)}
{rows}

## Limits

- Phantoms only: no claim about real ultrasound follows from these numbers.
- Two regions of the generator (lung, musculoskeletal) were never trained on; hints about them are meant to be silent.
- Words outside the phantoms' questions and reports are outside its vocabulary of meaning.
"""
    )
