"""Losses against their definitions, with gradients; the top k's tail counts as it should."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sonoedge.errors import SonoEdgeError
from sonoedge.export.balance import balance_loss
from sonoedge.export.distilling.losses import (
    chosen_experts,
    crowding,
    divergence,
    relative_distance,
    spread_distance,
    top_k,
)
from sonoedge.export.distilling.matching import matched_layers

ROWS, VOCAB = 7, 40


@pytest.fixture
def said() -> tuple[Tensor, Tensor]:
    """What student and teacher say: logits [rows, vocab], the student's with a gradient."""
    generator = torch.Generator().manual_seed(3)
    mine, theirs = (4 * torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    return mine.requires_grad_(), theirs


@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_whole_distributions_diverge_as_defined(said: tuple[Tensor, Tensor], heat: float) -> None:
    mine, theirs = said
    p, q = (functional.softmax(logits / heat, dim=-1) for logits in (theirs, mine))
    wanted = (p * (p / q).log()).sum(-1)
    assert torch.allclose(divergence(mine, theirs, heat).double(), wanted, atol=1e-5)


@pytest.mark.parametrize("heat", [1.0, 2.5])
def test_the_top_k_of_all_tokens_is_the_whole(said: tuple[Tensor, Tensor], heat: float) -> None:
    mine, theirs = said
    whole, all_of_them = divergence(mine, theirs, heat), divergence(mine, top_k(theirs, VOCAB, heat), heat)
    assert torch.allclose(whole, all_of_them, atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), mine, retain_graph=True)[0] for loss in (whole, all_of_them)]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


@pytest.mark.parametrize("count", [1, 5, 39])
def test_the_tail_counts_as_one_token(said: tuple[Tensor, Tensor], count: int) -> None:
    """Against a vocabulary in which the others really are one token."""
    mine, theirs = said
    kept = theirs.topk(count).indices

    def merged(logits: Tensor) -> Tensor:
        p = functional.softmax(logits / 2, dim=-1)
        return torch.cat([p.gather(1, kept), (1 - p.gather(1, kept).sum(1, keepdim=True))], dim=1)

    p, q = merged(theirs), merged(mine)
    wanted = (p * (p / q).log()).sum(-1)
    found = divergence(mine, top_k(theirs, count, 2.0), 2.0)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert (found <= divergence(mine, theirs, 2.0) + 1e-5).all()
    assert (found >= -1e-6).all()
    gradients = [torch.autograd.grad(loss.sum(), mine, retain_graph=True)[0] for loss in (found, wanted)]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_equal_distributions_do_not_diverge_and_tail_mass_costs() -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    taught = top_k(logits, 4, 1.0)
    assert divergence(logits, taught, 1.0).abs().max() < 1e-6
    spilled = logits.scatter_add(1, logits.topk(5).indices[:, 4:], torch.full((3, 1), 6.0))  # ratios in the top 4 stay
    assert (divergence(spilled, taught, 1.0) > 0.05).all()


def test_a_tail_too_small_for_floats_gives_finite_losses() -> None:
    logits = torch.full((1, 10), -1e5)
    logits[0, 3] = 0.0
    mine = torch.zeros(1, 10, requires_grad=True)
    loss = divergence(mine, top_k(logits, 2, 1.0), 1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert mine.grad is not None
    assert torch.isfinite(mine.grad).all()


def test_crowding_is_the_balance_loss_at_the_load_of_its_own_tokens() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(2))
    chosen = chosen_experts(logits, 2)
    assert chosen.sum() == 100
    mine = crowding(logits, chosen / chosen.sum()).mean()
    assert mine == pytest.approx(float(balance_loss([logits], 2)), abs=1e-5)


def test_distances_are_in_the_teachers_units() -> None:
    theirs = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(4))
    mine = theirs + 1
    assert torch.allclose(spread_distance(mine, theirs), 1 / theirs.flatten(1).var(1))
    assert torch.allclose(spread_distance(10 * mine, 10 * theirs), spread_distance(mine, theirs), rtol=1e-4)
    rows = theirs[0]
    assert torch.allclose(relative_distance(torch.zeros_like(rows), rows), torch.ones(6))
    assert torch.allclose(relative_distance(3 * rows, 1.5 * rows), torch.ones(6))


def test_layers_are_matched_evenly_or_as_named() -> None:
    assert matched_layers(1, 6, ()) == (5,)
    assert matched_layers(3, 5, ()) == (0, 2, 4)
    assert matched_layers(2, 5, (1, 3)) == (1, 3)
    with pytest.raises(SonoEdgeError, match="names 1 layers and the student has 2: name one for each"):
        matched_layers(2, 5, (1,))
    with pytest.raises(SonoEdgeError, match="names layer 5 and the teacher's go from 0 to 4"):
        matched_layers(2, 5, (1, 5))
