"""StackedAdamW: each row is torch's AdamW with torch's clipping and transformers' schedule, and only its own."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from raycap.config import from_dict
from raycap.errors import ConfigError
from raycap.train import optim
from raycap.train.optim import GROWTH_STEPS, LossScale, StackedAdamW, lr_at
from raycap.trial import trial_spec

CPU = torch.device("cpu")
SCHEDULES = {
    "constant": lambda o, s: get_constant_schedule_with_warmup(o, s.warmup_steps),
    "linear": lambda o, s: get_linear_schedule_with_warmup(o, s.warmup_steps, s.steps),
    "cosine": lambda o, s: get_cosine_schedule_with_warmup(o, s.warmup_steps, s.steps),
}


def specs():
    config = from_dict({"train": {"steps": 30}})
    changes = [
        {"train.lr": 1e-2, "train.schedule": "linear", "train.warmup_steps": 5, "train.weight_decay": 0.1},
        {"train.lr": 1e-3, "train.schedule": "cosine", "train.max_grad_norm": 0.1, "train.beta2": 0.95},
        {"train.lr": 3e-2, "train.schedule": "constant", "train.warmup_ratio": 0.2, "train.beta1": 0.8},
    ]
    return [trial_spec(config, f"t{k}", change) for k, change in enumerate(changes)]


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_transformers(schedule, warmup):
    overrides = {"train.schedule": schedule, "train.warmup_steps": warmup, "train.lr": 3e-3}
    spec = trial_spec(from_dict({"train": {"steps": 30}}), "t", overrides)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=spec.lr)
    theirs = SCHEDULES[schedule](optimiser, spec)
    for step in range(35):
        assert lr_at(spec, step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimiser.step()
        theirs.step()


def test_an_unknown_schedule_is_refused():
    import dataclasses

    with pytest.raises(ConfigError, match="valid: cosine"):
        lr_at(dataclasses.replace(specs()[0], schedule="cosin"), 9)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("block", [8, 1 << 17])
def test_rows_are_torchs_adamw_and_clipping(dtype, rel, block, monkeypatch):
    monkeypatch.setattr(optim, "BLOCK", block)
    torch.manual_seed(0)
    trials = specs()
    value = torch.randn(3, 17, dtype=dtype)
    leaves = [row.clone().requires_grad_() for row in value]
    theirs = [
        torch.optim.AdamW([leaf], lr=s.lr, betas=(s.beta1, s.beta2), weight_decay=s.weight_decay)
        for leaf, s in zip(leaves, trials)
    ]
    schedules = [SCHEDULES[s.schedule](o, s) for o, s in zip(theirs, trials)]
    m, v, stacked = torch.zeros_like(value), torch.zeros_like(value), StackedAdamW(trials, CPU, dtype)
    for step in range(12):
        grads = torch.randn(3, 17, dtype=dtype) * 10.0 ** torch.randint(-3, 3, (3, 1))
        norms = []
        for leaf, optimiser, schedule, spec, g in zip(leaves, theirs, schedules, trials, grads):
            leaf.grad = g.clone()
            norms.append(torch.nn.utils.clip_grad_norm_([leaf], spec.max_grad_norm).item())
            optimiser.step()
            schedule.step()
        found, finite = stacked.step(
            value, grads, m, v, steps=[step] * 3, updates=[step] * 3, losses=torch.ones(3, dtype=dtype)
        )
        assert finite.all()
        assert found.tolist() == pytest.approx(norms, rel=rel)
    for row, leaf in zip(value, leaves):
        assert torch.allclose(row, leaf.detach(), rtol=rel, atol=rel)


@pytest.mark.parametrize("where", ["loss", "gradient", "overflow"])
def test_a_slot_that_is_not_finite_stands_still_and_alone(where):
    torch.manual_seed(0)
    trials = specs()

    def update(broken):
        value, m, v = (torch.full((3, 17), x) for x in (1.0, 0.1, 0.2))
        grads, losses = torch.linspace(-1, 1, 51).view(3, 17).clone(), torch.ones(3)
        if broken and where == "loss":
            losses[1] = float("nan")
        elif broken:
            grads[1, 4] = float("inf" if where == "overflow" else "nan")
        made = StackedAdamW(trials, CPU, torch.float32).step(
            value, grads, m, v, steps=[6, 6, 6], updates=[5, 5, 5], losses=losses
        )
        return value, m, v, made[1].tolist()

    clean, broken = update(False), update(True)
    assert clean[3] == [True, True, True]
    assert broken[3] == [True, False, True]
    for before, one, other in zip((1.0, 0.1, 0.2), clean[:3], broken[:3]):
        assert torch.equal(other[1], torch.full((17,), before))
        assert torch.equal(one[[0, 2]], other[[0, 2]])


def test_scaled_gradients_are_unscaled_before_clipping():
    trials, made = specs(), []
    for scales in (None, [1024.0, 2.0, 65536.0]):
        value, m, v = torch.ones(3, 17), torch.zeros(3, 17), torch.zeros(3, 17)
        grads = torch.linspace(-1, 1, 51).view(3, 17).clone()
        if scales is not None:
            grads *= torch.tensor(scales)[:, None]
        norms, _ = StackedAdamW(trials, CPU, torch.float32).step(
            value, grads, m, v, steps=[6] * 3, updates=[0] * 3, losses=torch.ones(3), loss_scales=scales
        )
        made.append((norms, value, m, v))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*made))


def test_loss_scale_halves_and_grows():
    scale = LossScale(8.0)
    scale.update(False)
    assert (scale.value, scale.good) == (4.0, 0)
    for _ in range(GROWTH_STEPS):
        scale.update(True)
    assert (scale.value, scale.good) == (8.0, 0)
    for _ in range(9):
        scale.update(False)
    assert scale.value == 1.0
