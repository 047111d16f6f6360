"""The training loop: one for a laptop's processor, for several processes, for GPUs and for FSDP over nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from sonoedge.errors import SonoEdgeError
from sonoedge.export.distilling.curves import CurveLog, Step
from sonoedge.export.distilling.draws import Draws, Pass, Share
from sonoedge.export.distilling.lesson import LOAD, OVER, Counts, Lesson, counted, even_load
from sonoedge.export.distilling.run_state import Position, RunState
from sonoedge.export.distilling.taught import Teaches
from sonoedge.export.recipe import Distillation
from sonoedge.export.schedule import warm_cosine
from sonoedge.progress import track

BETAS, WEIGHT_DECAY, LONGEST_GRADIENT = (0.9, 0.97), 0.02, 1.0


class Trainer:
    """Trains a lesson; equal inputs give equal weights on a machine, any number of processes the same losses."""

    def __init__(
        self, lesson: Lesson, settings: Distillation, accelerator: Accelerator, state: RunState | None = None
    ) -> None:
        """Raises SonoEdgeError when there are more processes than samples in a batch, and for a damaged state."""
        if settings.batch < accelerator.num_processes:
            raise SonoEdgeError(
                f"distill.batch = {settings.batch} and there are {accelerator.num_processes} processes: raise it to at "
                "least that, or start fewer"
            )
        self._settings, self._accelerator, self._state = settings, accelerator, state
        self._weights, self._student_config = lesson.weights, lesson.student.config
        optimiser = torch.optim.AdamW(
            lesson.parameters(), lr=settings.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.lesson, self.optimiser = accelerator.prepare(lesson, optimiser)
        self._load = even_load(self._student_config)
        self._next = 0
        if state is not None and (position := state.restore()) is not None:
            self._next = position.step
            self._load = torch.tensor(position.load).reshape(self._load.shape)
        self._load = self._load.to(accelerator.device)

    def run(self, draws: Draws, teacher: Teaches, last: int | None = None) -> None:
        """Train the steps that are left, up to `last`, without it; raises SonoEdgeError when the loss is not finite."""
        settings, accelerator = self._settings, self._accelerator
        share = Share(settings.batch, accelerator.process_index, accelerator.num_processes, settings.accumulate)
        self.lesson.train()
        with self._log() as log, track("distil the student", settings.steps) as advance:
            advance(self._next)
            for step, passes in share.steps(draws, self._next, last or settings.steps):
                losses = self._step(step, passes, teacher)
                rate = self._rate(step)
                total = sum(self._weights[name] * value for name, value in losses.items())
                if log is not None:
                    log.add(Step(step=step, learning_rate=rate, total=total, losses=losses))
                advance(1, " ".join(f"{name} {value:.3f}" for name, value in losses.items()))
                self._next = done = step + 1
                if self._state is not None and (done % settings.save_every_steps == 0 or done == settings.steps):
                    self._state.save(Position(step=done, load=self._load.tolist()))
                    if log is not None:
                        log.draw()

    def _step(self, step: int, passes: Sequence[Pass], teacher: Teaches) -> dict[str, float]:
        """One step over this process's passes; gives the losses of all processes together."""
        accelerator, vision_only = self._accelerator, step < self._settings.vision_steps
        counts, longest = self._agree(passes)
        sums: dict[str, Tensor] = {}
        for index in range(longest):
            # All processes gather sharded weights at once, so one with fewer passes repeats its last for nothing.
            item, live = passes[min(index, len(passes) - 1)], index < len(passes)
            waits = index < longest - 1
            with accelerator.no_sync(self.lesson) if waits else nullcontext():
                taught = teacher.taught(item, vision_only=vision_only).to(accelerator.device)
                found = self.lesson(item.batch.to(accelerator.device), taught, self._load, vision_only)
                # Gradients are averaged over processes where they should be added.
                share = accelerator.num_processes * live
                weighed = [w * share / counts.of(n) * found[n] for n, w in self._weights.items() if n in found]
                accelerator.backward(torch.stack(weighed).sum())
            if live:
                for name, value in found.items():
                    sums[name] = sums.get(name, 0) + value.detach()
        means = self._together(sums, counts)
        # Known to all processes, so that they stop together.
        if not all(map(math.isfinite, means.values())):
            wrong = ", ".join(f"{name} {value}" for name, value in means.items())
            raise SonoEdgeError(
                f"the loss is not finite at step {step} ({wrong}): lower distill.learning_rate in the recipe"
            )
        accelerator.clip_grad_norm_(self.lesson.parameters(), LONGEST_GRADIENT)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(step)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return means

    def _agree(self, passes: Sequence[Pass]) -> tuple[Counts, int]:
        """What the losses are means over, and how many passes the process with most has."""
        mine = [counted(item.batch) for item in passes]
        numbers = [sum(getattr(counts, name) for counts in mine) for name in Counts.__struct_fields__]
        told = torch.tensor([[*numbers, len(passes)]], device=self._accelerator.device)
        gathered: Tensor = self._accelerator.gather(told)  # [processes, 4]
        samples, answers, tokens = gathered[:, :3].sum(0).tolist()
        return Counts(samples=samples, answers=answers, tokens=tokens), int(gathered[:, 3].max())

    def _together(self, sums: dict[str, Tensor], counts: Counts) -> dict[str, float]:
        """Mean losses over all processes; keeps the experts' load for the next step."""
        names = [name for name in OVER if name in sums]
        load = sums.get(LOAD)
        flat = torch.cat([torch.stack([sums[n].float() for n in names]), *([] if load is None else [load.flatten()])])
        flat = self._accelerator.reduce(flat, "sum")
        if load is not None:
            chosen = flat[len(names) :].view_as(load)
            self._load = chosen / chosen.sum(-1, keepdim=True)
        return {name: value / counts.of(name) for name, value in zip(names, flat.tolist(), strict=False)}

    def _rate(self, step: int) -> float:
        settings = self._settings
        shape = warm_cosine(step, steps=settings.steps, warmup_steps=settings.warmup_steps)
        return settings.learning_rate * shape

    @contextmanager
    def _log(self) -> Iterator[CurveLog | None]:
        """The log, where this process writes one."""
        if self._state is None or not self._accelerator.is_main_process:
            yield None
            return
        log = CurveLog(self._state.folder, self._next)
        try:
            yield log
        finally:
            log.close()
