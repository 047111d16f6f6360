"""Quantization-aware distillation: a student whose products are rounded learns to answer as it did in float.

Gradients go straight through the rounding (see `export.fake_quant`); activation ranges stay those of calibration, and
the scales of weights follow the weights. Source: A. Polino et al., "Model compression via distillation and
quantization" (arXiv 1802.05668).
"""

from __future__ import annotations

import copy

import msgspec
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from sonoedge.errors import SonoEdgeError
from sonoedge.export.corpus import Batch, Batches, Corpus
from sonoedge.export.divergence import Divergence, Reference, real_tokens
from sonoedge.export.fake_quant import fake_quantized
from sonoedge.export.models.echovlm import EchoVLM
from sonoedge.export.packing import IGNORE
from sonoedge.export.recipe import Qat
from sonoedge.export.schedule import warm_cosine
from sonoedge.export.scheme import QuantizationPlan
from sonoedge.progress import track
from sonoedge.runtime.preprocess import ImageSpec
from sonoedge.runtime.tokens import Tokenizer

HELD_BATCHES = 4  # to tell whether tuning helped


class Tuned(msgspec.Struct, frozen=True):
    """What tuning gave; divergences are from the float model, on batches that were not trained on."""

    model: EchoVLM  # the given one where tuning did not help
    before: Divergence
    after: Divergence

    @property
    def helped(self) -> bool:
        """Whether the tuned model is the closer one: a model that loses next to nothing has nothing to gain."""
        return self.after.kl < self.before.kl


def tune(
    model: EchoVLM,
    corpus: Corpus,
    tokenizer: Tokenizer,
    spec: ImageSpec,
    plan: QuantizationPlan,
    settings: Qat,
    *,
    context: int,
) -> Tuned:
    """Train a copy of the float32 `model`, on the CPU, to lose less in the schemes and ranges of `plan`.

    Equal inputs give equal copies. Under several processes each takes batches of its own. Raises SonoEdgeError when
    the loss is not finite, and naming the product that calibration never saw.
    """
    batches = Batches(corpus, tokenizer, spec, size=settings.batch, seed=settings.seed, context=context)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    trained_on = settings.steps * accelerator.num_processes
    held = [batch for _, batch in batches.steps(trained_on, trained_on + HELD_BATCHES)]
    reference = Reference(model, held)
    with fake_quantized(model, plan):
        before = reference.compare(model)
    student = copy.deepcopy(model).requires_grad_(True).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, betas=(0.9, 0.97), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: warm_cosine(step, steps=settings.steps, warmup_steps=settings.warmup_steps)
    )
    lesson, optimiser, schedule = accelerator.prepare(_Lesson(student, settings.temperature), optimiser, schedule)
    teacher = model.to(accelerator.device).eval()
    with fake_quantized(student, plan, straight_through=True), track("tune in INT8", settings.steps) as advance:
        for step in range(settings.steps):
            batch = batches.batch(step * accelerator.num_processes + accelerator.process_index)
            batch = batch.to(accelerator.device)
            with torch.no_grad():
                taught = _said(teacher, batch)
            losses: dict[str, Tensor] = lesson(batch, taught)
            total = torch.stack(list(losses.values())).sum()
            # Of all processes together, so that they stop together.
            if not torch.isfinite(accelerator.reduce(total.detach(), "mean")):
                raise SonoEdgeError(f"the loss is not finite at step {step}: lower qat.learning_rate in the recipe")
            accelerator.backward(total)
            accelerator.clip_grad_norm_(lesson.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
            advance(1, " ".join(f"{name} {loss.item():.2g}" for name, loss in losses.items()))
    model.cpu()
    student.cpu().eval()
    with fake_quantized(student, plan):
        after = reference.compare(student)
    return Tuned(student if after.kl < before.kl else model, before, after)


class _Said(msgspec.Struct, frozen=True):
    """What a model makes of one batch."""

    embeds: Tensor  # image tokens [merged, hidden]
    hidden: tuple[Tensor, ...]  # layers + 1 of [B, S, hidden]
    logits: Tensor  # [answers, vocab]


def _said(model: EchoVLM, batch: Batch) -> _Said:
    packed = batch.packed
    embeds = model.encode_images(batch.patches, batch.grids)
    output = model(
        packed.input_ids,
        packed.positions,
        image_embeds=embeds,
        attention_bias=packed.attention_bias,
        logits_rows=packed.labels != IGNORE,
        collect_hidden=True,
    )
    return _Said(embeds, output.hidden_states, output.logits)


class _Lesson(nn.Module):
    """The student and its losses as one module: processes that train together see the calls of this forward only."""

    def __init__(self, student: EchoVLM, temperature: float) -> None:
        super().__init__()
        self.student, self.temperature = student, temperature

    def forward(self, batch: Batch, taught: _Said) -> dict[str, Tensor]:
        """Every loss of one batch."""
        said = _said(self.student, batch)
        heat, tokens = self.temperature, real_tokens(batch.packed)
        pairs = zip(said.hidden, taught.hidden, strict=True)
        return {
            "logits": heat**2
            * functional.kl_div(
                functional.log_softmax(said.logits / heat, dim=-1),
                functional.log_softmax(taught.logits / heat, dim=-1),
                log_target=True,
                reduction="batchmean",
            ),
            "hidden": torch.stack([_distance(mine[tokens], theirs[tokens]) for mine, theirs in pairs]).mean(),
            "embeds": _distance(said.embeds, taught.embeds),
        }


def _distance(mine: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared difference in units of the teacher's spread."""
    return functional.mse_loss(mine, theirs) / theirs.var()
