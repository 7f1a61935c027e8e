"""The loss: torch's own a slot, in pieces and whole, and the gradient that it leaves in the logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from raycap.train import loss as module
from raycap.train.loss import slot_losses


@pytest.fixture
def case():
    """Two slots of three rows; logits [M, V], labels, rows, tokens a slot."""
    torch.manual_seed(0)
    rows = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5])
    return torch.randn(10, 11, dtype=torch.float64) * 3, torch.randint(0, 11, (10,)), rows, torch.tensor([6.0, 4.0])


def test_is_the_mean_over_each_slots_tokens(case):
    logits, labels, rows, tokens = case
    found = slot_losses(logits, labels, rows, 3, tokens)
    assert found[0] == pytest.approx(F.cross_entropy(logits[:6], labels[:6]).item(), rel=1e-12)
    assert found[1] == pytest.approx(F.cross_entropy(logits[6:], labels[6:]).item(), rel=1e-12)


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_the_gradient_is_autograds(case, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block * 11)
    logits, labels, rows, tokens = case
    leaf = logits.clone().requires_grad_()
    scales = torch.tensor([2.0, 0.5])
    total = 2.0 * F.cross_entropy(leaf[:6], labels[:6]) + 0.5 * F.cross_entropy(leaf[6:], labels[6:])
    total.backward()
    own = logits.clone()
    losses = slot_losses(own, labels, rows, 3, tokens, gradient=True, scales=scales)
    assert torch.allclose(own, leaf.grad, atol=1e-14)
    assert torch.equal(losses, slot_losses(logits, labels, rows, 3, tokens))


def test_pieces_add_up_to_the_whole(case):
    logits, labels, rows, tokens = case
    whole = slot_losses(logits, labels, rows, 3, tokens)
    total = torch.zeros(2, dtype=torch.float64)
    for piece in range(3):  # one row of each slot at a time
        mine = rows % 3 == piece
        total += slot_losses(logits[mine], labels[mine], rows[mine] // 3, 1, tokens)
    assert torch.allclose(total, whole, atol=1e-14)


def test_a_slot_without_tokens_in_a_piece_adds_nothing(case):
    logits, labels, rows, tokens = case
    found = slot_losses(logits[:6], labels[:6], rows[:6], 3, tokens)
    assert found[1] == 0


def test_a_nan_stays_in_its_slot(case):
    logits, labels, rows, tokens = case
    logits = logits.clone()
    logits[8, 3] = float("nan")
    found = slot_losses(logits, labels, rows, 3, tokens, gradient=True)
    assert torch.isfinite(found).tolist() == [True, False]
    assert torch.isfinite(logits[:6]).all()


def test_bf16_logits_are_summed_in_fp32(case):
    logits, labels, rows, tokens = case
    found = slot_losses(logits.bfloat16(), labels, rows, 3, tokens)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), slot_losses(logits.bfloat16().double(), labels, rows, 3, tokens), rtol=1e-6)
