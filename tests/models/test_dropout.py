"""Keyed dropout: right on average, a pure function of its keys, and of nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from raycap.models.dropout import KeyedDropout, Keys, drop_limits, kept_share, key_base_dropout, mix, put_on

CPU = torch.device("cpu")


def keys(seeds=(1, 2), steps=(0, 0), first_row=0):
    found = Keys()
    found.set(seeds, steps, CPU, first_row)
    return found


def kept(k, name, shape, shares):
    """Booleans of `shape` [K*b, ..., D]."""
    mask = k.mask(name, torch.Size(shape), drop_limits(shares, CPU))
    assert set(mask.unique().tolist()) <= {0, -1}
    return (mask != 0).view(shape)


def test_mix_is_a_bijection():
    values = torch.arange(2**20, dtype=torch.int64) * 4093 % 2**32
    assert len(mix(values).unique()) == 2**20
    assert int(mix(values).max()) < 2**32


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_shares_hold_per_slot_line_and_feature(p):
    found = kept(keys(), "m", (8, 100, 128), [p, p]).double()
    n = found.numel()
    sigma = max((p * (1 - p)) ** 0.5, 1e-12)
    assert abs(found.mean() - kept_share(p)) <= 5 * sigma / n**0.5
    assert (found.mean((0, 1)) - (1 - p)).abs().max() <= 5 * sigma / 800**0.5 + 1e-4
    assert (found.mean(2) - (1 - p)).abs().max() <= 6 * sigma / 128**0.5 + 1e-4


def test_slots_have_their_own_share():
    found = kept(keys((1, 2, 3), (0, 0, 0)), "m", (12, 50, 64), [0.0, 0.2, 0.6]).double().view(3, -1).mean(1)
    assert found.tolist() == pytest.approx([1.0, 0.8, 0.4], abs=0.02)


def test_elements_do_not_go_together():
    """Neighbouring features, lines, slots, steps and modules: correlations of the size that chance gives."""
    k = keys()
    one = kept(k, "a", (32, 64, 64), [0.3, 0.3]).double() - 0.7
    other = kept(k, "b", (32, 64, 64), [0.3, 0.3]).double() - 0.7
    later = kept(keys(steps=(1, 1)), "a", (32, 64, 64), [0.3, 0.3]).double() - 0.7
    pairs = {
        "features": (one[..., ::2], one[..., 1::2]),
        "features further": (one[..., :32], one[..., 32:]),
        "positions": (one[:, :-1], one[:, 1:]),
        "rows": (one[:15], one[1:16]),
        "slots": (one[:16], one[16:]),
        "modules": (one, other),
        "steps": (one, later),
    }
    for name, (x, y) in pairs.items():
        size = float((x * y).mean()) / 0.21
        assert abs(size) < 5 / x.numel() ** 0.5, (name, size)
    # Every pair of features over the lines, and of lines over the features: no pair stands out.
    flat = one.reshape(-1, 64)
    features = (flat.T @ flat / len(flat) / 0.21).fill_diagonal_(0)
    assert features.abs().max() < 6 / len(flat) ** 0.5


def test_a_mask_is_a_function_of_its_keys():
    whole = kept(keys((5, 6), (3, 9)), "m", (8, 20, 31), [0.4, 0.4])
    alone = kept(keys((6,), (9,)), "m", (4, 20, 31), [0.4])
    assert torch.equal(whole[4:], alone)  # packing
    short = kept(keys((6,), (9,)), "m", (4, 11, 31), [0.4])
    assert torch.equal(alone[:, :11], short)  # padding
    piece = kept(keys((6,), (9,), first_row=2), "m", (2, 20, 31), [0.4])
    assert torch.equal(alone[2:], piece)  # micro-batches
    first = kept(keys((5, 6), (3, 9)), "m", (8, 20, 31), [0.4, 0.0])
    assert torch.equal(first[:4], whole[:4])  # a neighbour's share
    for changed in (keys((7,), (9,)), keys((6 + 2**32,), (9,)), keys((6,), (8,))):
        assert not torch.equal(kept(changed, "m", (4, 20, 31), [0.4]), alone)
    assert not torch.equal(kept(keys((6,), (9,)), "n", (4, 20, 31), [0.4]), alone)


def test_rows_and_positions_in_one_axis_are_told_apart():
    """A projector that flattens [K*b, N, D] to [K*b*N, D] meets the same masks, whatever the micro-batch."""
    whole, half = Keys(), Keys()
    whole.set((1, 2), (0, 0), CPU, 0, 4)
    half.set((1, 2), (0, 0), CPU, 2, 2)
    shares = [0.5, 0.5]
    flat = kept(whole, "m", (8 * 5, 16), shares).view(8, 5, 16)
    assert torch.equal(flat, kept(whole, "m", (8, 5, 16), shares))
    later = kept(half, "m", (4 * 5, 16), shares).view(2, 2, 5, 16)
    assert torch.equal(later, flat.view(2, 4, 5, 16)[:, 2:])


def test_attention_masks_do_not_depend_on_the_length():
    long, short = (kept(keys((6,), (9,)), "a", (2, 4, t, t), [0.4]) for t in (13, 9))
    assert torch.equal(long[:, :, :9, :8], short[..., :8])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_put_on_clears_even_a_nan(dtype):
    x = torch.tensor([[[1.0, -2.0, float("nan"), 4.0]]], dtype=dtype)
    mask = torch.tensor([[[-1, 0, 0, -1]]], dtype=torch.int16)
    assert put_on(x, mask).tolist() == [[[1.0, 0.0, 0.0, 4.0]]]


def test_keyed_dropout_as_a_module():
    k = keys()
    drop = KeyedDropout("d", 0.25, k)
    x = torch.ones(4, 5, 6, requires_grad=True)
    y = drop(x)
    assert torch.equal(drop(x), y)
    y.sum().backward()
    assert torch.equal(x.grad, y)  # of ones: kept and scaled up
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert drop.eval()(x) is x
    k.clear()
    assert drop.train()(x) is x


def test_the_bases_own_dropout_is_keyed_or_off(load, pixel_values):
    cm = load()
    k = Keys()
    dropping = [n for n, m in cm.model.named_modules() if type(m) is nn.Dropout and m.p > 0]
    assert key_base_dropout(cm.model, k, on=True) == len(dropping) == 1 + 3 * 2
    ids = torch.arange(3, 13).repeat(6, 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    cm.model.train()

    def logits():
        with torch.no_grad():
            return cm.family.label_logits(cm, batch, pixel_values(cm)).logits

    k.set([1], [0], CPU)
    torch.manual_seed(0)
    first = logits()
    torch.manual_seed(1)
    assert torch.equal(first, logits())  # nothing draws from the global generator
    k.set([1], [1], CPU)
    assert not torch.equal(first, logits())
    k.clear()
    clean = logits()
    cm.model.eval()
    assert torch.equal(clean, logits())
    off = load()
    key_base_dropout(off.model, k, on=False)
    off.model.train()
    with torch.no_grad():
        assert torch.equal(clean, off.family.label_logits(off, batch, pixel_values(off)).logits)
