"""Slots trained together are what plain peft makes of each of them alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import step_inputs
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from raycap.models.lora import start

SCHEDULES = {
    "constant": lambda o, s: get_constant_schedule_with_warmup(o, s.warmup_steps),
    "cosine": lambda o, s: get_cosine_schedule_with_warmup(o, s.warmup_steps, s.steps),
    "linear": lambda o, s: get_linear_schedule_with_warmup(o, s.warmup_steps, s.steps),
}


def train_with_peft(model, engine, spec, steps):
    """(losses, weights by path) of one trial by peft, torch's AdamW, transformers' schedule and loss."""
    dtype = next(model.parameters()).dtype
    targets = engine.cm.family.match_targets(engine.linears, "language", spec.targets)
    peft = get_peft_model(model, LoraConfig(r=spec.r, lora_alpha=spec.alpha, target_modules=targets))
    own = {n: p for n, p in peft.named_parameters() if p.requires_grad}
    begin = start(spec, {t: engine.shapes[t] for t in targets})
    with torch.no_grad():
        for name, p in own.items():
            path = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            p.data = begin[path][0 if ".lora_A." in name else 1].to(dtype)
    optimiser = torch.optim.AdamW(
        own.values(), lr=spec.lr, betas=(spec.beta1, spec.beta2), weight_decay=spec.weight_decay
    )
    schedule = SCHEDULES[spec.schedule](optimiser, spec)
    losses = []
    peft.train()
    for step in range(steps):
        text = step_inputs(engine, step, dtype)
        output = peft(**text)
        loss = output.loss
        if dtype == torch.float64:  # transformers' own loss rounds the logits to fp32
            logits = output.logits[:, -text["labels"].shape[1] : -1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text["labels"][:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), spec.max_grad_norm)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    weights = {}
    for name, p in own.items():
        if ".lora_A." in name:
            path = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]
            weights[path] = (p.detach(), own[name.replace(".lora_A.", ".lora_B.")].detach())
    return losses, weights


def assert_as_alone(engine, oracle, specs, run, steps, *, rel):
    for spec in specs:
        engine.admit(spec)
    losses = run(engine, steps)
    ends = {}
    for spec in specs:
        alone, ends[spec.trial_id] = train_with_peft(oracle(), engine, spec, steps)
        assert losses[spec.trial_id] == pytest.approx(alone, rel=rel, abs=0), spec.trial_id
    return ends


def test_packed_equals_plain_peft_in_fp64(make_engine, config, specs, oracle, run):
    c = config(train__weight_decay=0.01, train__max_grad_norm=0.5)
    engine, trials = make_engine(c, dtype="fp64"), specs(c, 4)
    trials[3] = specs(c, 4, **{"lora.targets": ["query", "intermediate.dense"]})[3]  # others' modules are not its own
    ends = assert_as_alone(engine, lambda: oracle(c, torch.float64), trials, run, 20, rel=1e-9)
    for spec in trials:
        value = engine.state(spec.trial_id)["value"]
        assert set(value) == set(ends[spec.trial_id])
        for path, (a, b) in value.items():
            for mine, theirs in zip((a, b), ends[spec.trial_id][path]):
                assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11), (spec.trial_id, path)


def test_packed_equals_plain_peft_in_fp32(make_engine, config, specs, oracle, run, delta):
    c = config()
    engine, trials = make_engine(c), specs(c, 4)
    ends = assert_as_alone(engine, lambda: oracle(c, torch.float32), trials, run, 20, rel=1e-5)
    for spec in trials:
        apart = delta(engine.state(spec.trial_id)["value"], ends[spec.trial_id])
        print(f"{spec.trial_id}: r={spec.r} lr={spec.lr}: ||dW - dW'|| / ||dW|| = {apart:.1e}")
        assert apart <= 1e-3


def test_packed_equals_alone_with_dropout(make_engine, config, specs, dropping_twin, run, delta):
    c = config(model__path=str(dropping_twin))
    trials = specs(c, 4, dropout=0.2)
    trials[1] = specs(c, 4, dropout=0.0)[1]
    pack = make_engine(c)
    for spec in trials:
        pack.admit(spec)
    together = run(pack, 12)
    for spec in trials:
        one = make_engine(c)
        one.admit(spec)
        assert run(one, 12)[spec.trial_id] == pytest.approx(together[spec.trial_id], rel=1e-5)
        assert delta(one.state(spec.trial_id)["value"], pack.state(spec.trial_id)["value"]) <= 1e-3


def test_slots_that_come_and_go_change_no_other(make_engine, config, specs, run, delta):
    c = config(train__base_dropout=True)
    a, b, d, _ = specs(c, 4, dropout=0.1)
    still, busy = make_engine(c), make_engine(c)
    still.admit(a)
    alone = run(still, 15)["t0"]
    busy.admit(a)
    busy.admit(b)
    losses = run(busy, 4)["t0"]
    busy.release("t1")
    busy.admit(d)  # of another rank, at its own step 0 beside t0's step 4
    losses += run(busy, 3)["t0"]
    busy.pause("t2")
    losses += run(busy, 4)["t0"]
    busy.resume("t2")
    losses += run(busy, 4)["t0"]
    assert losses == pytest.approx(alone, rel=1e-5)
    assert delta(still.state("t0")["value"], busy.state("t0")["value"]) <= 1e-3


def test_bf16_drifts_little(make_engine, config, specs, run):
    c = config()
    exact, coarse = make_engine(c), make_engine(c, dtype="bf16")
    for engine in (exact, coarse):
        for spec in specs(c, 2):
            engine.admit(spec)
    fine, rough = run(exact, 10), run(coarse, 10)
    drift = max(abs(x - y) / x for t in fine for x, y in zip(fine[t], rough[t]))
    print(f"largest relative difference of a bf16 loss: {drift:.1e}")
    assert drift < 0.03
