"""What pruning costs before any training: KL to the teacher, each step alone and together, by weights and measured.

python -m benchmarks.pruning [CHECKPOINT] [--frames 64]

On fresh phantoms, not those that importance was measured on; CHECKPOINT is else the packaged teacher. The last line is
JSON.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import msgspec
import torch
import typer
from torch import Tensor
from torch.nn import functional

from sonoedge.calibration.pool import phantom_pool
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.corpus import PhantomCorpus
from sonoedge.export.divergence import answer_output
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.preset import alone
from sonoedge.export.prune.checkpoint import prune_checkpoint
from sonoedge.export.prune.section import StudentShape
from sonoedge.export.recipe import load_recipe

PACKAGED = Path(__file__).resolve().parents[1] / "export" / "demo_checkpoint"
FIRST_FRAME_SEED = 9_400_000  # far from every recipe's
STEPS: dict[str, StudentShape] = {
    "3 of 5 layers": StudentShape(layers=3),
    "4 of 6 vision blocks": StudentShape(vision_layers=4),
    "vision inner 480 of 640": StudentShape(vision_mlp_size=480),
    "dense 160 of 320": StudentShape(intermediate_size=160),
    "experts 48 of 96": StudentShape(expert_size=48),
    "shared 80 of 160": StudentShape(shared_expert_size=80),
    "4 of 5 heads, hidden 128 of 160": StudentShape(heads=4),
    "3 of 4 experts, dropped": StudentShape(experts=3, importance="measured"),
    "3 of 4 experts, merged": StudentShape(experts=3, expert_method="merge", importance="measured"),
    "the demo's student": StudentShape(4, 192, 2, 96, 32, 48),
}


class Step(msgspec.Struct, frozen=True):
    """One student."""

    step: str
    importance: Literal["weights", "measured"]
    share: float  # of the teacher's parameters
    kl: float  # nats an answer token
    top1: float


class Report(msgspec.Struct, frozen=True):
    """What was measured in one run."""

    benchmark: str
    checkpoint: str
    frames: int
    steps: tuple[Step, ...]


def distance(spoken: Tensor, said: Tensor) -> tuple[float, float]:
    """KL(teacher || student) in nats, and the share of tokens whose likeliest next token is the same."""
    student, teacher = (functional.log_softmax(logits.double(), dim=-1) for logits in (spoken, said))
    kl = functional.kl_div(student, teacher, log_target=True, reduction="batchmean")
    return float(kl), float((spoken.argmax(-1) == said.argmax(-1)).double().mean())


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Teacher.")] = PACKAGED,
    frames: Annotated[int, typer.Option(min=1, help="Fresh phantoms to compare on.")] = 64,
) -> None:
    """Prune the teacher in every way and compare."""
    recipe, spec = load_recipe("demo"), image_spec(checkpoint)
    teacher = load_checkpoint(checkpoint)
    tokenizer = open_tokenizer(checkpoint, teacher.config)
    found = []
    with TemporaryDirectory() as name:
        work, settings = Path(name), recipe.calibration
        measured = phantom_pool(
            work / "m", settings.frames, first_seed=settings.first_frame_seed, spec=spec, label="render calibration"
        )
        fresh = phantom_pool(work / "f", frames, first_seed=FIRST_FRAME_SEED, spec=spec, label="render fresh frames")
        batches = alone(PhantomCorpus(fresh, spec), tokenizer, spec, recipe.limits.context)
        said = [answer_output(teacher, batch).logits for batch in batches]
        for number, (step, shape) in enumerate(STEPS.items()):
            for importance in ("weights", "measured") if shape.importance == "weights" else ("measured",):
                asked = msgspec.structs.replace(shape, importance=importance)
                corpus = PhantomCorpus(measured, spec) if importance == "measured" else None
                out = work / f"{number} {importance}"
                student = prune_checkpoint(checkpoint, msgspec.structs.replace(recipe, student=asked), corpus, out)
                pruned = load_checkpoint(out)
                spoken = [answer_output(pruned, batch).logits for batch in batches]
                kl, top1 = distance(torch.cat(spoken), torch.cat(said))
                share = student.parameters / student.teacher_parameters
                found.append(Step(step, importance, share, kl, top1))
                print(f"| {step} | {importance} | {share:.0%} | {kl:.4f} | {top1:.1%} |", flush=True)
    print(msgspec.json.encode(Report("pruning", checkpoint.name, frames, tuple(found))).decode())


if __name__ == "__main__":
    typer.run(main)
