"""Divergence, signal to noise and expert sets against hand counts and against torch."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from sonoedge.export.fidelity.metrics import SignalToNoise, expert_sets, kl_divergence, lead


def logits_of(*rows: list[float]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return np.log(np.array(rows, np.float32))


def test_kl_by_hand() -> None:
    """(½, ½) against (¼, ¾): ½ ln 2 + ½ ln ⅔."""
    found = kl_divergence(logits_of([0.5, 0.5]), logits_of([0.25, 0.75]))
    assert found == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3)], abs=1e-7)


def test_kl_as_torch_computes_it() -> None:
    rng = np.random.default_rng(0)
    reference, candidate = (rng.normal(0, 3, (7, 50)).astype(np.float32) for _ in range(2))
    wanted = functional.kl_div(
        torch.log_softmax(torch.tensor(candidate).double(), -1),
        torch.log_softmax(torch.tensor(reference).double(), -1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    assert kl_divergence(reference, candidate) == pytest.approx(wanted.numpy())


def test_kl_of_equal_rows_and_of_shifted_logits_is_zero() -> None:
    row = np.array([[1.0, -2.0, 1e4]], np.float32)
    assert kl_divergence(row, row) == 0
    assert kl_divergence(row[:, :2], row[:, :2] + 3) == pytest.approx(0, abs=1e-12)


def test_a_word_out_of_reach_of_both_adds_nothing() -> None:
    masked = np.array([[0.0, 0.0, -1e9]], np.float32)
    assert kl_divergence(masked, masked) == 0


def test_signal_to_noise_by_hand_over_two_pieces() -> None:
    """Power 4·100 against 2·1 + 2·0: 23.01 dB."""
    gathered = SignalToNoise()
    gathered.add(np.full(2, 10, np.float32), np.full(2, 9, np.float32))
    gathered.add(np.full(2, -10, np.float32), np.full(2, -10, np.float32))
    assert gathered.decibels == pytest.approx(10 * math.log10(200))


def test_no_noise_is_infinite_and_no_signal_is_finite() -> None:
    clean = SignalToNoise()
    clean.add(np.ones(3, np.float32), np.ones(3, np.float32))
    assert clean.decibels == "infinite"
    silent = SignalToNoise()
    silent.add(np.zeros(3, np.float32), np.ones(3, np.float32))
    assert isinstance(silent.decibels, float)
    assert math.isfinite(silent.decibels)


def test_expert_sets_are_those_that_torch_routes_to() -> None:
    router = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    chosen = torch.topk(torch.softmax(torch.tensor(router), -1), 2, -1).indices.numpy()
    sets = expert_sets(router, 2)
    assert (sets.sum(axis=1) == 2).all()
    assert all(set(np.flatnonzero(row)) == set(wanted) for row, wanted in zip(sets, chosen, strict=True))


def test_the_order_within_a_set_does_not_matter() -> None:
    one, other = np.array([[3.0, 2.0, 1.0]], np.float32), np.array([[2.0, 3.0, 1.0]], np.float32)
    assert (expert_sets(one, 2) == expert_sets(other, 2)).all()
    assert not (expert_sets(one, 1) == expert_sets(other, 1)).all()


def test_a_lead_is_a_difference_of_probabilities() -> None:
    assert lead(logits_of([0.5, 0.2, 0.3])[0] + 7, 0, 2) == pytest.approx(0.2)
