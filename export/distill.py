"""`sonoedge distill`: a student cut from its teacher learns to answer, and to see, as the teacher does.

`accelerate launch -m sonoedge distill …` does the same with several processes, GPUs or nodes (see docs/distill.md).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import torch
from accelerate import Accelerator
from torch import nn

from sonoedge.calibration.pool import PhantomPool, phantom_pool
from sonoedge.errors import SonoEdgeError
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.corpus import Batches, Corpus, open_corpus
from sonoedge.export.distilling.draws import Draws
from sonoedge.export.distilling.hashes import checkpoint_hash, files_hash
from sonoedge.export.distilling.lesson import Lesson, wanted_outputs
from sonoedge.export.distilling.processes import join, one_voice
from sonoedge.export.distilling.pruned import STUDENT, hash_in_vocabulary, prune_to_start
from sonoedge.export.distilling.run_state import Identity, RunState, forget
from sonoedge.export.distilling.taught import LiveTeacher, Teaches, Wanted
from sonoedge.export.distilling.taught_files import TaughtFiles, TaughtManifest
from sonoedge.export.distilling.training import Trainer
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import empty_model, load_checkpoint, save_checkpoint
from sonoedge.export.models.saving import TOKENIZER_FILES
from sonoedge.export.recipe import Distillation, Recipe, StudentShape, load_recipe
from sonoedge.export.student import cut_student, takes_folder
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

PHANTOMS = "phantoms"  # in the training folder, as long as a run may go on


class Kept(msgspec.Struct, frozen=True):
    """Where a run keeps what it can go on from."""

    folder: Path  # of the state, the log and its page
    identity: Identity
    taught: Path | None = None  # folder of the teacher's recorded outputs


def distil(
    teacher: EchoVLM,
    tokenizer: Tokenizer,
    corpus: Corpus,
    spec: ImageSpec,
    recipe: Recipe,
    *,
    accelerator: Accelerator | None = None,
    kept: Kept | None = None,
    student: EchoVLM | None = None,
) -> EchoVLM:
    """Cut the recipe's student from `teacher` and train it on `corpus`; equal inputs give equal students on a machine.

    student: one that was cut already, of the teacher's vocabulary. kept: None keeps nothing. Under FSDP only the main
    process gets the student's weights. A recipe in bf16 leaves the teacher so. Raises SonoEdgeError when the loss is
    not finite, and as `cut_student` does.
    """
    shape, settings = sections(recipe)
    torch.manual_seed(settings.seed)
    if student is None:
        student = cut_student(teacher, shape)
    wanted = wanted_outputs(student.config, teacher.config, settings)
    accelerator = accelerator or join()
    collator = Batches(corpus, tokenizer, spec, size=settings.batch, seed=settings.seed, context=recipe.limits.context)
    draws = Draws(
        corpus,
        collator,
        seed=settings.seed,
        distinct=settings.distinct_draws,
        in_order=settings.turns == "in order",
    )
    lesson = Lesson(student, teacher.config, settings)
    state = None if kept is None else RunState(kept.folder, kept.identity, accelerator)
    trainer = Trainer(lesson, settings, accelerator, state)
    trainer.run(draws, _teaches(teacher, wanted, draws, recipe, accelerator, kept))
    weights = accelerator.get_state_dict(trainer.lesson)
    trained = empty_model(student.config)
    if accelerator.is_main_process or weights:
        own = {name.removeprefix("student."): tensor for name, tensor in weights.items() if name.startswith("student.")}
        trained.load_state_dict({name: tensor.detach().cpu() for name, tensor in own.items()}, assign=True)
    return trained.eval()


def _teaches(
    teacher: EchoVLM, wanted: Wanted, draws: Draws, recipe: Recipe, accelerator: Accelerator, kept: Kept | None
) -> Teaches:
    """The teacher at work, or recorded where `kept` says so."""
    _, settings = sections(recipe)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32

    def live() -> LiveTeacher:
        return LiveTeacher(teacher.to(accelerator.device, dtype).eval(), wanted, accelerator.device)

    if kept is None or kept.taught is None:
        return live()
    if wanted.logits and not wanted.top_k:
        raise SonoEdgeError("distill.top_k = 0 keeps whole distributions, which are not recorded: give 64, for example")
    manifest = TaughtManifest(
        teacher=kept.identity.teacher,
        data=kept.identity.data,
        seed=settings.seed,
        turns=settings.turns,
        draws=settings.distinct_draws or settings.steps * settings.batch,
        context=recipe.limits.context,
        precision=settings.precision,
        wanted=wanted,
    )
    files = TaughtFiles(kept.taught, manifest, accelerator)
    if not files.complete():
        files.record(draws, live(), most=-(-settings.batch // accelerator.num_processes))
    return files


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


def run(checkpoint: Path, recipe: str | None, data: str, out: Path, as_json: bool, taught: Path | None = None) -> None:
    """The verb: distil CHECKPOINT into OUT, a checkpoint of the same format; the log and the state lie beside it."""
    accelerator = join()
    with one_voice(accelerator):
        _run(checkpoint, recipe, data, out, as_json, taught, accelerator)
    accelerator.end_training()


def _run(
    checkpoint: Path,
    recipe: str | None,
    data: str,
    out: Path,
    as_json: bool,
    taught: Path | None,
    accelerator: Accelerator,
) -> None:
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
    folder = training_folder(out)
    corpus = _corpus(data, spec, settings, folder, accelerator)
    if not corpus.answered:
        raise SonoEdgeError(f"--data {data}: frames without answers teach nothing: give conversations, or phantoms")
    identity = _identity(checkpoint, settings, data, corpus)
    counts = {"teacher_parameters": parameters(teacher)}
    files_from, begun = checkpoint, None
    if takes_folder(sections(settings)[0]):
        drawn = files_hash([], identity.recipe, identity.teacher, identity.data)
        start = prune_to_start(checkpoint, teacher, settings, corpus, folder, accelerator, identity=drawn)
        files_from, begun, teacher, tokenizer = start.folder, start.student, start.teacher, start.tokenizer
        identity = msgspec.structs.replace(identity, teacher=hash_in_vocabulary(identity.teacher, start))
    kept = Kept(folder, identity, taught)
    student = distil(teacher, tokenizer, corpus, spec, settings, accelerator=accelerator, kept=kept, student=begun)
    if not accelerator.is_main_process:
        return
    save_checkpoint(student, out, tokenizer_files_from=files_from)
    forget(folder)
    for leftover in (folder / PHANTOMS, *folder.glob(f"{STUDENT}-*")):
        shutil.rmtree(leftover, ignore_errors=True)
    counts["student_parameters"] = parameters(student)
    if as_json:
        told = {"out": str(out), "training": str(folder), **counts}
        print(msgspec.json.encode(told).decode())
    else:
        share = counts["student_parameters"] / counts["teacher_parameters"]
        print(f"{out}: a student of {counts['student_parameters']:,} parameters, {share:.0%} of its teacher's")


def training_folder(out: Path) -> Path:
    """Where the log, its page and the state of the run that makes `out` lie."""
    return out.with_name(f"{out.name}.training")


def _corpus(data: str, spec: ImageSpec, recipe: Recipe, folder: Path, accelerator: Accelerator) -> Corpus:
    if data != "phantoms":
        return open_corpus(data, spec, None, labelled=True)
    with accelerator.main_process_first():  # it renders, the others find the frames
        return open_corpus(data, spec, distillation_pool(folder / PHANTOMS, spec, recipe))


def _identity(checkpoint: Path, recipe: Recipe, data: str, corpus: Corpus) -> Identity:
    shape, settings = sections(recipe)
    training = msgspec.json.encode((shape, settings, recipe.limits.context), order="sorted").decode()
    phantoms = [data, str(settings.first_frame_seed), str(settings.frames)] if data == "phantoms" else []
    return Identity(
        recipe=files_hash([], training), teacher=checkpoint_hash(checkpoint), data=files_hash(corpus.files, *phantoms)
    )


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())
