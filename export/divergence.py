"""How far a model's next-token distributions are from the float model's on held samples, the right answers given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from sonoedge.export.corpus import Batch
from sonoedge.export.fake_quant import fake_quantized
from sonoedge.export.models.echovlm import EchoVLM, ModelOutput
from sonoedge.export.packing import IGNORE, PackedBatch
from sonoedge.export.scheme import QuantizationPlan


class Divergence(msgspec.Struct, frozen=True):
    """The distance from the float model."""

    kl: float  # mean over answer tokens of KL(float || model), nats
    top1: float  # share of answer tokens with the same most likely token
    router: float  # share of tokens and layers with the same set of experts; 1 for a dense model


class _Answers(msgspec.Struct, frozen=True):
    """What a model says to one batch."""

    logits: Tensor  # [answers, vocab]
    chosen: Tensor  # bool [layers, tokens, experts]


class Reference:
    """The float model's answers to fixed batches, kept to compare other models with: 4 · answers · vocab bytes."""

    def __init__(self, model: EchoVLM, batches: Sequence[Batch]) -> None:
        self._batches = batches
        self._wanted = [_answers(model, batch) for batch in batches]

    def compare(self, model: EchoVLM) -> Divergence:
        """Run `model` as it is, fake-quantized or not, on the same batches."""
        kl, same, answers, routed, tokens = 0.0, 0, 0, 0, 0
        for batch, wanted in zip(self._batches, self._wanted, strict=True):
            found = _answers(model, batch)
            # In float64: the divergence of a good plan is smaller than the rounding of float32 probabilities.
            spoken, said = (functional.log_softmax(each.logits.double(), dim=-1) for each in (found, wanted))
            kl += float(functional.kl_div(spoken, said, log_target=True, reduction="sum"))
            same += int((found.logits.argmax(-1) == wanted.logits.argmax(-1)).sum())
            answers += wanted.logits.shape[0]
            agree = (found.chosen == wanted.chosen).all(-1)  # [layers, tokens]
            routed, tokens = routed + int(agree.sum()), tokens + agree.numel()
        # A sum of rounding errors may fall below 0, where no divergence lies.
        return Divergence(max(kl, 0.0) / answers, same / answers, routed / tokens if tokens else 1.0)


def evaluator(model: EchoVLM, batches: Sequence[Batch]) -> Callable[[QuantizationPlan], Divergence]:
    """Measures plans: `model` in the plan's schemes against itself in float, on `batches`."""
    reference = Reference(model, batches)

    def evaluate(plan: QuantizationPlan) -> Divergence:
        with fake_quantized(model, plan):
            return reference.compare(model)

    return evaluate


def real_tokens(packed: PackedBatch) -> Tensor:
    """bool [B, S]: every token but padding, which alone does not see the first."""
    return packed.attention_bias[:, 0, :, 0] == 0


@torch.no_grad()
def answer_output(model: EchoVLM, batch: Batch, *, collect_router: bool = False) -> ModelOutput:
    """A pass whose logits are those of the answers' tokens [answers, vocab]."""
    packed = batch.packed
    output: ModelOutput = model(
        packed.input_ids,
        packed.positions,
        image_embeds=model.encode_images(batch.patches, batch.grids),
        attention_bias=packed.attention_bias,
        logits_rows=packed.labels != IGNORE,
        collect_router=collect_router,
    )
    return output


@torch.no_grad()
def _answers(model: EchoVLM, batch: Batch) -> _Answers:
    output = answer_output(model, batch, collect_router=True)
    assert output.router_logits is not None  # asked for
    tokens = real_tokens(batch.packed)
    top = model.config.moe.num_experts_per_tok if model.config.moe else 0
    chosen = [
        torch.zeros_like(logits[tokens], dtype=torch.bool).scatter_(-1, logits[tokens].topk(top, -1).indices, True)
        for logits in output.router_logits
    ]  # layers of [tokens, experts]
    return _Answers(output.logits, torch.stack(chosen) if chosen else torch.zeros(0, 0, 0, dtype=torch.bool))
