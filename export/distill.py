"""`sonoedge distill`: a student cut from its teacher learns to answer, and to see, as the teacher does.

Source: G. Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531); image tokens are matched as
well, since the vision tower is what a small student loses first.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.calibration.pool import PhantomPool, phantom_pool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.balance import balance_loss
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.corpus import Batch, Batches, Corpus, open_corpus
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint, save_checkpoint
from sonoedge.export.models.saving import TOKENIZER_FILES
from sonoedge.export.packing import IGNORE
from sonoedge.export.recipe import Distillation, Recipe, StudentShape, load_recipe
from sonoedge.export.schedule import warm_cosine
from sonoedge.export.student import cut_student
from sonoedge.progress import track
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer


def distil(teacher: EchoVLM, tokenizer: Tokenizer, corpus: Corpus, spec: ImageSpec, recipe: Recipe) -> EchoVLM:
    """Cut the recipe's student from `teacher` and train it on `corpus`; equal inputs give equal students on a machine.

    Raises SonoEdgeError when the loss is not finite, and as `cut_student` does.
    """
    shape, settings = sections(recipe)
    torch.manual_seed(settings.seed)
    student = cut_student(teacher, shape)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimiser = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, betas=(0.9, 0.97), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: warm_cosine(step, steps=settings.steps, warmup_steps=settings.warmup_steps)
    )
    student, optimiser, schedule = accelerator.prepare(student, optimiser, schedule)
    teacher = teacher.to(accelerator.device).eval()
    batches = Batches(corpus, tokenizer, spec, size=settings.batch, seed=settings.seed, context=recipe.limits.context)
    student.train()
    with track("distil the student", settings.steps) as advance:
        for step, batch in batches.steps(0, settings.steps):
            moved = batch.to(accelerator.device)
            losses = _losses(student, teacher, moved, settings, vision_only=step < settings.vision_steps)
            total = torch.stack([weight * loss for weight, loss in losses.values()]).sum()
            if not torch.isfinite(total):
                raise SonoEdgeError(
                    f"the loss is {total.item()} at step {step}: lower distill.learning_rate in the recipe"
                )
            accelerator.backward(total)
            accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            advance(1, " ".join(f"{name} {loss.item():.3f}" for name, (_, loss) in losses.items()))
    trained: EchoVLM = accelerator.unwrap_model(student).cpu().eval()
    return trained


def _losses(
    student: EchoVLM, teacher: EchoVLM, batch: Batch, settings: Distillation, *, vision_only: bool
) -> dict[str, tuple[float, Tensor]]:
    """Every loss of one batch with its weight."""
    with torch.no_grad():
        taught_embeds = teacher.encode_images(batch.patches, batch.grids)  # [merged, hidden]
    embeds = student.encode_images(batch.patches, batch.grids)
    seen = {"embeds": (settings.embeds_weight, functional.mse_loss(embeds, taught_embeds) / taught_embeds.var())}
    if vision_only:
        return seen
    # Detached: the vision tower learns more from the teacher's image tokens alone than from tokens and answers.
    return seen | _decoder_losses(student, teacher, batch, embeds.detach(), taught_embeds, settings)


def _decoder_losses(
    student: EchoVLM, teacher: EchoVLM, batch: Batch, embeds: Tensor, taught_embeds: Tensor, settings: Distillation
) -> dict[str, tuple[float, Tensor]]:
    packed = batch.packed
    rows = packed.labels != IGNORE  # [B, S]
    with torch.no_grad():
        taught = teacher(
            packed.input_ids,
            packed.positions,
            image_embeds=taught_embeds,
            attention_bias=packed.attention_bias,
            logits_rows=rows,
        ).logits  # [answers, vocab]
    output = student(
        packed.input_ids,
        packed.positions,
        image_embeds=embeds,
        attention_bias=packed.attention_bias,
        logits_rows=rows,
        collect_router=True,
    )
    mixture = teacher.config.moe
    assert mixture is not None  # cut_student refuses a teacher without experts
    heat = settings.temperature
    spoken = functional.log_softmax(output.logits / heat, dim=-1)  # [answers, vocab]
    taught = functional.log_softmax(taught / heat, dim=-1)
    return {
        "answers": (
            settings.answer_weight,
            functional.cross_entropy(output.logits, packed.labels[rows]),
        ),
        "logits": (
            settings.logits_weight * heat**2,
            functional.kl_div(spoken, taught, log_target=True, reduction="batchmean"),
        ),
        "balance": (
            settings.balance_weight,
            balance_loss(output.router_logits, mixture.num_experts_per_tok),
        ),
    }


def sections(recipe: Recipe) -> tuple[StudentShape, Distillation]:
    """What the recipe says of the student and its training; raises SonoEdgeError when it says nothing of them."""
    if recipe.student is None or recipe.distill is None:
        raise SonoEdgeError("the recipe has no [student] or no [distill]: add both, or take the recipe demo")
    return recipe.student, recipe.distill


def distillation_pool(folder: Path, spec: ImageSpec, recipe: Recipe) -> PhantomPool:
    """The phantoms that the recipe distils on."""
    _, settings = sections(recipe)
    label = "render training phantoms"
    return phantom_pool(folder, settings.frames, first_seed=settings.first_frame_seed, spec=spec, label=label)


def run(checkpoint: Path, recipe: str | None, data: str, out: Path, as_json: bool) -> None:
    """The verb: distil CHECKPOINT into OUT, a checkpoint of the same format."""
    settings = load_recipe(recipe)
    sections(settings)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SonoEdgeError(f"{out} exists and is not an empty folder: choose another --out or remove it")
    teacher = load_checkpoint(checkpoint)
    tokenizer = open_tokenizer(checkpoint, teacher.config)
    for name in TOKENIZER_FILES:  # the student takes them over: refused now, not after minutes of training
        if not (checkpoint / name).is_file():
            raise SonoEdgeError(f"{checkpoint / name} does not exist: copy it from the checkpoint again")
    spec = image_spec(checkpoint)
    with TemporaryDirectory(prefix="sonoedge-") as work:
        pool = distillation_pool(Path(work), spec, settings) if data == "phantoms" else None
        corpus = open_corpus(data, spec, pool, labelled=True)
        if not corpus.answered:
            raise SonoEdgeError(f"--data {data}: frames without answers teach nothing: give conversations, or phantoms")
        student = distil(teacher, tokenizer, corpus, spec, settings)
    save_checkpoint(student, out, tokenizer_files_from=checkpoint)
    counts = {"teacher_parameters": parameters(teacher), "student_parameters": parameters(student)}
    if as_json:
        print(msgspec.json.encode({"out": str(out), **counts}).decode())
    else:
        share = counts["student_parameters"] / counts["teacher_parameters"]
        print(f"{out}: a student of {counts['student_parameters']:,} parameters, {share:.0%} of its teacher's")


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())
