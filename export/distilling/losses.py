"""The losses of distillation, one value a row, so that any split of a batch over passes and processes adds up.

Sources: G. Hinton et al., "Distilling the knowledge in a neural network" (arXiv 1503.02531); A. Romero et al.,
"FitNets" (arXiv 1412.6550) for hidden states; W. Fedus et al., "Switch Transformers" (arXiv 2101.03961) for balance.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

LEAST_LOG = -6e4  # of a probability: float16 holds it, and its exponential is 0


class TopK(msgspec.Struct, frozen=True):
    """A next-token distribution by its likeliest tokens and the mass of all others."""

    indices: Tensor  # int64 [rows, k]
    log_probabilities: Tensor  # [rows, k]
    log_tail: Tensor  # [rows], of all other tokens together

    def to(self, device: torch.device) -> TopK:
        """The same on `device`."""
        return TopK(*(tensor.to(device) for tensor in msgspec.structs.astuple(self)))


def top_k(logits: Tensor, count: int, temperature: float) -> TopK:
    """The `count` likeliest tokens of logits [rows, vocab] at a temperature, all where there are fewer."""
    log_probabilities = functional.log_softmax(logits.float() / temperature, dim=-1)
    found = log_probabilities.topk(min(count, logits.shape[-1]), dim=-1)
    # Added up from the other tokens themselves: one less the mass of the first would round a small tail away.
    tail = log_probabilities.scatter(-1, found.indices, -torch.inf).logsumexp(-1)
    return TopK(found.indices, found.values.clamp(min=LEAST_LOG), tail.clamp(min=LEAST_LOG))


def divergence(logits: Tensor, taught: Tensor | TopK, temperature: float) -> Tensor:
    """KL [rows] of what the student says, logits [rows, vocab], from what it is taught, logits or their top k.

    With the top k all other tokens count as one: 0 for equal distributions, never above the whole divergence, and
    mass that the student gives to other tokens costs what it should.
    """
    said = functional.log_softmax(logits.float() / temperature, dim=-1)
    if isinstance(taught, Tensor):
        wanted = functional.log_softmax(taught.float() / temperature, dim=-1)
        return functional.kl_div(said, wanted, log_target=True, reduction="none").sum(-1)
    wanted = taught.log_probabilities.float()
    found = (wanted.exp() * (wanted - said.gather(-1, taught.indices))).sum(-1)
    if taught.indices.shape[-1] == logits.shape[-1]:
        return found
    tail, said_tail = taught.log_tail.float(), said.scatter(-1, taught.indices, -torch.inf).logsumexp(-1)
    return found + tail.exp() * (tail - said_tail)


def spread_distance(mine: Tensor, theirs: Tensor) -> Tensor:
    """Mean squared difference [samples] in units of the teacher's spread there; both [samples, tokens, width]."""
    theirs = theirs.float()
    return (mine.float() - theirs).pow(2).mean((-2, -1)) / theirs.flatten(1).var(-1)


def relative_distance(mine: Tensor, theirs: Tensor) -> Tensor:
    """Squared length [rows] of the difference in units of the teacher's; both [rows, width].

    A row at a time, because a few tokens of a decoder have states hundreds of times longer than all others.
    """
    theirs = theirs.float()
    return (mine.float() - theirs).pow(2).sum(-1) / theirs.pow(2).sum(-1).clamp(min=1e-12)


def router_divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    """KL [rows] of the student's routing from the teacher's; router logits [rows, the teacher's experts]."""
    return divergence(mine, theirs, 1.0)


def chosen_experts(router_logits: Tensor, count: int) -> Tensor:
    """How many rows choose each expert, float32 [experts]; router_logits [rows, experts]."""
    experts = router_logits.shape[-1]
    picked = router_logits.topk(count, dim=-1).indices.flatten()
    return torch.bincount(picked, minlength=experts).float()


def crowding(router_logits: Tensor, load: Tensor) -> Tensor:
    """The balance loss [rows]: 1 where experts are even; load [experts] is each one's share of what was chosen before.

    Taking the load from the step before makes the loss a sum over tokens: it is the same for any split of a batch.
    """
    probability = functional.softmax(router_logits.float(), dim=-1)  # [rows, experts]
    return load.shape[-1] * (probability * load).sum(-1)
