"""What the distillation loop costs beside a plain PyTorch loop of the same teacher, student, losses and samples."""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch
from torch import nn
from torch.nn import functional

from sonoedge.export.balance import balance_loss
from sonoedge.export.checkpoint_files import image_spec, open_tokenizer
from sonoedge.export.corpus import Batches, PhantomCorpus
from sonoedge.export.demo import CHECKPOINT
from sonoedge.export.distill import distillation_pool, sections
from sonoedge.export.distilling.draws import Draws, Pass
from sonoedge.export.distilling.lesson import Lesson, wanted_outputs
from sonoedge.export.distilling.processes import join
from sonoedge.export.distilling.run_state import Identity, RunState
from sonoedge.export.distilling.taught import LiveTeacher
from sonoedge.export.distilling.training import BETAS, LONGEST_GRADIENT, WEIGHT_DECAY, Trainer
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.models.loading import load_checkpoint
from sonoedge.export.packing import IGNORE
from sonoedge.export.recipe import Distillation, load_recipe
from sonoedge.export.student import cut_student

FRAMES = 64


class PlainLoop:
    """What one would write by hand, with nothing that is not needed for one process on one device."""

    def __init__(self, student: EchoVLM, teacher: EchoVLM, draws: Draws, settings: Distillation) -> None:
        self.student, self.teacher, self.draws, self.settings = student.train(), teacher, draws, settings
        self.optimiser = torch.optim.AdamW(
            student.parameters(), lr=settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )

    def run(self, first: int, last: int) -> None:
        """Train the steps `first` up to and without `last`."""
        for step in range(first, last):
            (item,) = self.draws.passes(
                range(step * self.settings.batch, (step + 1) * self.settings.batch), self.settings.batch
            )
            self._loss(item).backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), LONGEST_GRADIENT)
            self.optimiser.step()
            self.optimiser.zero_grad()

    def _loss(self, item: Pass) -> torch.Tensor:
        settings, packed, heat = self.settings, item.batch.packed, self.settings.temperature
        rows, mixture = packed.labels != IGNORE, self.teacher.config.moe
        assert mixture is not None
        with torch.no_grad():
            taught_embeds = self.teacher.encode_images(item.batch.patches, item.batch.grids)
            taught = self.teacher(
                packed.input_ids, packed.positions, image_embeds=taught_embeds,
                attention_bias=packed.attention_bias, logits_rows=rows,
            ).logits  # fmt: skip
        embeds = self.student.encode_images(item.batch.patches, item.batch.grids)
        output = self.student(
            packed.input_ids, packed.positions, image_embeds=embeds.detach(),
            attention_bias=packed.attention_bias, logits_rows=rows, collect_router=True,
        )  # fmt: skip
        spoken, wanted = (functional.log_softmax(logits / heat, dim=-1) for logits in (output.logits, taught))
        return (
            settings.embeds_weight * functional.mse_loss(embeds, taught_embeds) / taught_embeds.var()
            + settings.answer_weight * functional.cross_entropy(output.logits, packed.labels[rows])
            + settings.logits_weight
            * heat**2
            * functional.kl_div(spoken, wanted, log_target=True, reduction="batchmean")
            + settings.balance_weight * balance_loss(output.router_logits, mixture.num_experts_per_tok)
        )


def main() -> None:
    """Both loops take turns, a few steps each; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="of each loop in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with TemporaryDirectory(prefix="sonoedge-") as work:
        print(json.dumps(measure(Path(work), asked.rounds, asked.steps) | {"threads": asked.threads}))


def measure(work: Path, rounds: int, steps: int) -> dict[str, object]:
    """Seconds of a step of both loops, medians over the rounds, and their ratio (1: as fast; the goal is 0.8)."""
    recipe, spec = load_recipe(), image_spec(CHECKPOINT)
    shape, settings = sections(recipe)
    teacher = load_checkpoint(CHECKPOINT)
    tokenizer = open_tokenizer(CHECKPOINT, teacher.config)
    total = (rounds + 2) * steps  # more than are trained, so that no state is saved
    settings = msgspec.structs.replace(settings, frames=FRAMES, vision_steps=0, steps=total, save_every_steps=total)
    corpus = PhantomCorpus(
        distillation_pool(work / "frames", spec, msgspec.structs.replace(recipe, distill=settings)), spec
    )
    collator = Batches(corpus, tokenizer, spec, size=settings.batch, seed=settings.seed, context=recipe.limits.context)
    draws = Draws(corpus, collator, seed=settings.seed)
    student = cut_student(teacher, shape)
    plain = PlainLoop(copy.deepcopy(student), teacher, draws, settings)
    accelerator = join()
    # With its log, its shared counts and its checks, as the verb runs it.
    state = RunState(work / "training", Identity("recipe", "teacher", "data"), accelerator)
    trainer = Trainer(Lesson(student, teacher.config, settings), settings, accelerator, state)
    live = LiveTeacher(teacher, wanted_outputs(student.config, teacher.config, settings), accelerator.device)
    seconds: dict[str, list[float]] = {"plain": [], "sonoedge": []}
    for turn in range(rounds + 1):
        first, last = turn * steps, (turn + 1) * steps
        began = time.perf_counter()
        plain.run(first, last)
        between = time.perf_counter()
        trainer.run(draws, live, last)
        if turn:  # the first warms up
            seconds["plain"].append((between - began) / steps)
            seconds["sonoedge"].append((time.perf_counter() - between) / steps)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["sonoedge"], strict=True)]
    medians = {f"{name}_step_s": round(statistics.median(values), 4) for name, values in seconds.items()}
    return {
        "ratio": round(statistics.median(ratios), 3),
        "least_ratio": round(min(ratios), 3),
        **medians,
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
