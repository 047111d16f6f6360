"""The student with its projections and losses as one module: processes that train together see this forward only."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from sonoedge.errors import SonoEdgeError
from sonoedge.export.corpus import Batch
from sonoedge.export.distilling.losses import chosen_experts, crowding, divergence, spread_distance
from sonoedge.export.distilling.matching import Matching, matched_layers
from sonoedge.export.distilling.taught import Taught, Wanted
from sonoedge.export.divergence import real_tokens
from sonoedge.export.models.config import ModelConfig
from sonoedge.export.models.echovlm import DecoderLayer, EchoVLM, ModelOutput
from sonoedge.export.models.vision import VisionBlock
from sonoedge.export.packing import IGNORE
from sonoedge.export.recipe import Distillation

SAMPLES, ANSWERS, TOKENS = "samples", "answers", "tokens"
# What each loss is a mean over: images by the sample, the decoder by answer tokens, balance by all tokens but padding.
OVER = {
    "embeds": SAMPLES,
    "answers": ANSWERS,
    "logits": ANSWERS,
    "hidden": ANSWERS,
    "router": ANSWERS,
    "balance": TOKENS,
}
LOAD = "load"


def weights(settings: Distillation) -> dict[str, float]:
    """The weight of every loss that has one; the divergence of logits grows with the square of the temperature."""
    named = {
        "embeds": settings.embeds_weight,
        "answers": settings.answer_weight,
        "logits": settings.logits_weight * settings.temperature**2,
        "hidden": settings.hidden_weight,
        "router": settings.router_weight,
        "balance": settings.balance_weight,
    }
    return {name: weight for name, weight in named.items() if weight > 0}


def wanted_outputs(student: ModelConfig, teacher: ModelConfig, settings: Distillation) -> Wanted:
    """What the losses need of the teacher; SonoEdgeError for vocabularies that differ, and for layers it lacks."""
    if settings.logits_weight > 0 and student.vocab_size != teacher.vocab_size:
        raise SonoEdgeError(
            f"the student's vocabulary has {student.vocab_size} tokens and the teacher's {teacher.vocab_size}, which "
            "distill.logits_weight compares one by one: set it to 0, or keep the teacher's vocabulary"
        )
    if settings.embeds_weight > 0 and student.hidden_size != teacher.hidden_size:
        raise SonoEdgeError(
            f"the student's image tokens have {student.hidden_size} values and the teacher's {teacher.hidden_size}: "
            "set distill.embeds_weight and distill.vision_steps to 0, or keep the teacher's hidden size"
        )
    layers = matched_layers(student.num_hidden_layers, teacher.num_hidden_layers, settings.teacher_layers)
    return Wanted(
        temperature=settings.temperature,
        top_k=min(settings.top_k, teacher.vocab_size),
        logits=settings.logits_weight > 0,
        hidden_layers=layers if settings.hidden_weight > 0 else (),
        router_layers=layers if settings.router_weight > 0 else (),
    )


class Lesson(nn.Module):
    """Sums of every loss over one pass."""

    # What `accelerate` shards as a unit under FSDP, unless it is told otherwise.
    _no_split_modules = (DecoderLayer.__name__, VisionBlock.__name__)

    def __init__(self, student: EchoVLM, teacher: ModelConfig, settings: Distillation) -> None:
        super().__init__()
        self.student, self.settings, self.weights = student, settings, weights(settings)
        self.matching = Matching(
            student.config,
            teacher,
            hidden="hidden" in self.weights,
            router="router" in self.weights,
            seed=settings.seed,
        )
        if settings.recompute:
            for module in student.modules():
                if isinstance(module, DecoderLayer | VisionBlock):
                    _recompute(module)

    def forward(self, batch: Batch, taught: Taught, load: Tensor, vision_only: bool) -> dict[str, Tensor]:
        """Sums of the losses, as OVER says; load [layers, experts] of the step before, under LOAD that of this pass."""
        bf16 = self.settings.precision == "bf16"
        with torch.autocast(batch.patches.device.type, torch.bfloat16, enabled=bf16):
            embeds = self.student.encode_images(batch.patches, batch.grids)
            samples = batch.packed.input_ids.shape[0]
            found: dict[str, Tensor] = {}
            if "embeds" in self.weights:
                by_sample = (tensor.unflatten(0, (samples, -1)) for tensor in (embeds, taught.embeds))
                found["embeds"] = spread_distance(*by_sample).sum()
            if vision_only:
                return found
            # Detached: the vision tower learns more from the teacher's image tokens alone than from tokens and answers.
            seen = embeds.detach() if "embeds" in self.weights else embeds
            return found | self._decoder(batch, seen, taught, load)

    def _decoder(self, batch: Batch, embeds: Tensor, taught: Taught, load: Tensor) -> dict[str, Tensor]:
        packed, named = batch.packed, self.weights
        rows = packed.labels != IGNORE  # [B, S]
        output: ModelOutput = self.student(
            packed.input_ids,
            packed.positions,
            image_embeds=embeds,
            attention_bias=packed.attention_bias,
            logits_rows=rows,
            collect_hidden="hidden" in named,
            collect_router=True,
        )
        found: dict[str, Tensor] = {}
        if "answers" in named:
            found["answers"] = functional.cross_entropy(output.logits.float(), packed.labels[rows], reduction="sum")
        if taught.logits is not None:
            found["logits"] = divergence(output.logits, taught.logits, self.settings.temperature).sum()
        if output.hidden_states is not None:
            mine = [state[rows] for state in output.hidden_states[1:]]
            found["hidden"] = self.matching.hidden_loss(mine, taught.hidden).sum()
        routers = output.router_logits or ()
        if "router" in named:
            found["router"] = self.matching.router_loss([router[rows] for router in routers], taught.router).sum()
        if "balance" in named and routers:
            mixture = self.student.config.moe
            assert mixture is not None  # or there were no routers
            tokens = real_tokens(packed)
            of_tokens = [router[tokens] for router in routers]  # layers of [tokens, experts]
            pairs = zip(of_tokens, load, strict=True)
            found["balance"] = torch.stack([crowding(router, share) for router, share in pairs]).mean(0).sum()
            with torch.no_grad():
                chosen = [chosen_experts(router, mixture.num_experts_per_tok) for router in of_tokens]
                found[LOAD] = torch.stack(chosen)
        return found


def even_load(config: ModelConfig) -> Tensor:
    """The load [layers, experts] before anything was chosen; [0, 0] for a dense model."""
    if config.moe is None:
        return torch.zeros(0, 0)
    experts = config.moe.num_experts
    return torch.full((config.num_hidden_layers, experts), 1 / experts)


class Counts(msgspec.Struct, frozen=True):
    """What the sums of a step are divided by, over all passes of all processes."""

    samples: int
    answers: int
    tokens: int

    def of(self, loss: str) -> int:
        """The count that belongs to a loss."""
        count: int = getattr(self, OVER[loss])
        return count


def counted(batch: Batch) -> Counts:
    """The counts of one batch."""
    packed = batch.packed
    return Counts(
        samples=packed.input_ids.shape[0],
        answers=int((packed.labels != IGNORE).sum()),
        tokens=int(real_tokens(packed).sum()),
    )


def _recompute(module: nn.Module) -> None:
    """Keep a block's input only and run the block again in the backward pass."""
    forward = module.forward

    def recomputed(*arguments: object) -> object:
        return checkpoint(forward, *arguments, use_reentrant=False)

    module.forward = recomputed
